"""The tiny world: 64x64 pictures of two coloured shapes, with true captions.

The shapes stand side by side or one above the other. There are 96 captions. Positions, sizes and
the brightness of the background differ from picture to picture. A UNet of a few million parameters
learns this world in minutes on a CPU, and a program can read a picture's caption back from its
pixels (`sd_perf.evaluation.judge`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_perf.data.shard_writer import ShardWriter
from sd_perf.drafts import ASIDE, draft_folder
from sd_perf.errors import DataError
from sd_perf.files import disk_errors, write_text
from sd_perf.optional import optional

SIZE = 64
"""rows and columns of a picture, pixels"""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
}
"""name: RGB, 0 to 255"""
SHAPES = ("square", "circle")
RELATIONS = ("left of", "above")
DISTANCE = (15.0, 17.0)
"""smallest and largest distance of a shape's centre from the picture's, along the axis of the
relation, pixels"""
SIDESTEP = 5.0
"""largest distance of a shape's centre from the picture's, across that axis, pixels"""
HALF_WIDTH = (11.0, 13.5)
"""smallest and largest half side of a square, or radius of a circle, pixels. With DISTANCE it
keeps shapes from touching and from leaving the picture."""
BACKGROUND = (160.0, 235.0)
"""darkest and brightest grey level of the background, 0 to 255"""


@dataclass(frozen=True)
class Attributes:
    """What a caption says: the first shape is left of the second, or above it.

    The two colours differ.
    """

    first_colour: str
    first_shape: str
    relation: str
    second_colour: str
    second_shape: str

    @property
    def caption(self) -> str:
        """The caption in English, such as "a red square left of a blue circle"."""
        return (
            f"a {self.first_colour} {self.first_shape} {self.relation} a {self.second_colour} "
            f"{self.second_shape}"
        )


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows."""

    image: np.ndarray
    """(64, 64, 3) uint8 RGB"""
    caption: str
    attributes: Attributes


def all_attributes() -> list[Attributes]:
    """Every combination that the world holds, each once: 96."""
    return [
        Attributes(first, shape, relation, second, other)
        for first in COLOURS
        for second in COLOURS
        if first != second
        for shape in SHAPES
        for other in SHAPES
        for relation in RELATIONS
    ]


def render(seed: int, index: int) -> Scene:
    """Scene number `index` of a seed: the same picture and caption on every call. Both are >= 0."""
    # Only uniform doubles are drawn: numpy promises that random() of a bit generator gives the same
    # stream in every version, but does not promise it of the other distributions.
    draws = iter(np.random.Generator(np.random.Philox(key=[seed, index])).random(8))
    world = all_attributes()
    attributes = world[int(next(draws) * len(world))]
    image = np.full((SIZE, SIZE, 3), _between(BACKGROUND, next(draws)))
    names = (
        (attributes.first_colour, attributes.first_shape),
        (attributes.second_colour, attributes.second_shape),
    )
    # The first shape stands on the side of lower coordinates: left, or above. The order of draws
    # is part of the data: tests and trained assets hold these very pictures.
    for side, (colour, shape) in zip((-1, 1), names, strict=True):
        along = (SIZE - 1) / 2 + side * _between(DISTANCE, next(draws))
        across = (SIZE - 1) / 2 + _between((-SIDESTEP, SIDESTEP), next(draws))
        x, y = (along, across) if attributes.relation == "left of" else (across, along)
        cover = coverage(shape, x, y, _between(HALF_WIDTH, next(draws)))[..., None]
        image = image * (1 - cover) + np.array(COLOURS[colour]) * cover
    return Scene(np.rint(image).astype(np.uint8), attributes.caption, attributes)


def coverage(shape: str, x: float, y: float, half_width: float) -> np.ndarray:
    """Share of each pixel that a shape covers: (64, 64) float64 in [0, 1], antialiased.

    x and y are the column and row of the centre; they and half_width are in pixels.
    """
    pixels = np.arange(SIZE, dtype=np.float64)
    columns, rows = np.abs(pixels[None, :] - x), np.abs(pixels[:, None] - y)
    distance = np.maximum(columns, rows) if shape == "square" else np.hypot(columns, rows)
    return np.clip(half_width - distance + 0.5, 0, 1)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def write_scenes(folder: str | Path, num: int, seed: int, uncaptioned_every: int = 0) -> None:
    """Write scenes 0 to num - 1 of a seed as PNG files with a captions.jsonl.

    `sd-perf data prepare` reads such a folder. Where `uncaptioned_every` is n > 0, every n-th scene
    has the empty caption: from these a model learns the unconditional prediction that
    classifier-free guidance needs (Ho & Salimans, arXiv 2207.12598). Preparing them takes
    data.allow_empty_captions. Raises DataError where the folder already holds something.
    """
    folder = Path(folder)
    with disk_errors(folder, "make room or choose another folder", DataError):
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(ASIDE) for path in folder.iterdir()):
            raise DataError(f"{folder} is not empty; name a new folder for the scenes")
        # Aside, so that one that was stopped leaves nothing that the next would refuse.
        with draft_folder(folder) as draft:
            lines = []
            for index, (png, caption) in enumerate(_pictures(num, seed, uncaptioned_every)):
                (draft / f"{index:06d}.png").write_bytes(png)
                lines.append(json.dumps({"file": f"{index:06d}.png", "caption": caption}))
            for path in sorted(draft.iterdir()):
                path.replace(folder / path.name)
        # Last, so that a folder with captions is a folder with all its pictures.
        write_text(folder / "captions.jsonl", "\n".join(lines) + "\n")


def write_scene_shards(folder: str | Path, num: int, seed: int, uncaptioned_every: int = 0) -> None:
    """Write the same scenes as raw shards; see `sd_perf.data.prepare.raw_shards`."""
    with ShardWriter(folder) as writer:
        for png, caption in _pictures(num, seed, uncaptioned_every):
            writer.write_files({"json": b"{}", "png": png, "txt": caption.encode()})


def _pictures(num: int, seed: int, uncaptioned_every: int) -> Iterator[tuple[bytes, str]]:
    """PNG bytes and captions of scenes 0 to num - 1."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    for index in range(num):
        scene, png = render(seed, index), io.BytesIO()
        Image.fromarray(scene.image).save(png, format="png")
        uncaptioned = uncaptioned_every > 0 and index % uncaptioned_every == 0
        yield png.getvalue(), "" if uncaptioned else scene.caption
