"""Says whether a picture of the tiny world shows what its caption says, from the pixels: no
network, no learning.

A CLIP score flatters: it rewards the right colours in the wrong places. The judge looks for each
colour's pixels, measures whether they form a square or a circle, and compares where the two shapes
lie. It forgives what an autoencoder does to a picture (blur, small shifts of colour) and nothing
else: a missing, additional or shapeless object is a no.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sd_perf.data.prepare.scenes import COLOURS, HALF_WIDTH, SHAPES, Attributes, coverage

GREYS = (0, 60, 110, 150, 180, 205, 230, 255)
"""grey levels that count as background, 0 to 255"""
MIN_AREA, MAX_AREA = 250, 900
"""pixels of a shape; the world's smallest circle has 380, its largest square 729"""
MAX_STRAY = 60
"""pixels of a colour that no shape has: more are another object"""
MIN_OVERLAP = 0.8
"""of a shape's pixels with the ideal shape of the same centre and area: intersection over union"""


@dataclass(frozen=True)
class Object:
    """A coloured shape found in a picture."""

    colour: str
    shape: str
    x: float
    """column of its centre, pixels"""
    y: float
    """row of its centre, pixels"""


def judge(image: np.ndarray, caption: str) -> bool:
    """Whether the caption holds of a picture (64, 64, 3), uint8 or float in [0, 1], RGB.

    No for a caption that is none of the tiny world's: the judge cannot know.
    """
    return _shows(describe(image), caption)


def judge_shares(described: list[Attributes | None], captions: list[str]) -> dict[str, float]:
    """Shares of pictures, as `describe` sees them, that show their own caption, and the next one's
    if it is another."""
    own = [_shows(seen, caption) for seen, caption in zip(described, captions, strict=True)]
    nexts = zip(described, captions, captions[1:] + captions[:1], strict=True)
    others = [_shows(seen, other) for seen, caption, other in nexts if other != caption]
    return {"judge": float(np.mean(own)), "judge_shuffled": float(np.mean(others))}


def _shows(seen: Attributes | None, caption: str) -> bool:
    return seen is not None and seen.caption == caption


def describe(image: np.ndarray) -> Attributes | None:
    """What a picture (64, 64, 3), uint8 or float in [0, 1], RGB, shows; None where it is no scene
    of the world."""
    objects = find_objects(image)
    if objects is None or len(objects) != 2:
        return None
    a, b = objects
    across, down = abs(a.x - b.x), abs(a.y - b.y)
    relation = "left of" if across > down else "above"
    first, second = sorted(objects, key=lambda found: found.x if relation == "left of" else found.y)
    # Shapes that overlap by much, or lie on a diagonal, are in no relation that a person would
    # name.
    if max(across, down) < 2 * HALF_WIDTH[0] or min(across, down) > 0.7 * max(across, down):
        return None
    return Attributes(first.colour, first.shape, relation, second.colour, second.shape)


def find_objects(image: np.ndarray) -> list[Object] | None:
    """The shapes of a picture (64, 64, 3), one per colour; None where a colour's pixels form no
    shape."""
    names = list(COLOURS)
    labels = nearest_colour(image)
    objects = []
    for number, colour in enumerate(names):
        mask = labels == number
        if mask.sum() <= MAX_STRAY:
            continue
        found = _shape_of(mask)
        if found is None:
            return None
        objects.append(Object(colour, *found))
    return objects


def nearest_colour(image: np.ndarray) -> np.ndarray:
    """(64, 64) int: index into COLOURS of the colour nearest to each pixel, or len(COLOURS) for
    greys."""
    pixels = image.astype(np.float64) * (1 if image.dtype == np.uint8 else 255)
    palette = np.array([*COLOURS.values(), *([grey] * 3 for grey in GREYS)], dtype=np.float64)
    # |pixel - colour|^2 without |pixel|^2, which is the same for every colour
    distances = np.square(palette).sum(axis=1) - 2 * (pixels @ palette.T)
    return np.minimum(distances.argmin(axis=-1), len(COLOURS))


def _shape_of(mask: np.ndarray) -> tuple[str, float, float] | None:
    """Shape and centre (x, y) of a mask (64, 64) bool, or None where no ideal shape covers it
    well."""
    area = float(mask.sum())
    if not MIN_AREA <= area <= MAX_AREA:
        return None
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean()), float(rows.mean())
    half_widths = {"square": area**0.5 / 2, "circle": (area / np.pi) ** 0.5}
    overlaps = {
        shape: _overlap(mask, coverage(shape, x, y, half_widths[shape]) >= 0.5) for shape in SHAPES
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best, x, y) if overlaps[best] >= MIN_OVERLAP else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())
