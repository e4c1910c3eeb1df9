"""The judge: whether a picture of the tiny world shows what its caption says, from its pixels.

It complements the CLIP score, which rewards the right colours even in the wrong places. No network
is involved: the judge finds the pixels of each colour, decides whether they form a square or a
circle, and compares the positions of the two shapes. It tolerates what an autoencoder does to a
picture, blur and small shifts of colour, and nothing else: a picture with a missing, an additional
or a shapeless object does not pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sd_perf.data.prepare.scenes import COLOURS, HALF_WIDTH, SHAPES, Attributes, coverage

GREYS = (0, 60, 110, 150, 180, 205, 230, 255)
"""grey levels that count as background, 0 to 255"""
MIN_AREA, MAX_AREA = 250, 900
"""area of a shape, pixels; the world's smallest circle has 380, its largest square 729"""
MAX_STRAY = 60
"""pixels of one colour that are ignored; more of them count as an object"""
MIN_OVERLAP = 0.8
"""intersection over union of a shape's pixels and the ideal shape of the same centre and area"""


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
    """Whether a picture (64, 64, 3) RGB, uint8 or float in [0, 1], shows what the caption says.

    False for a caption that is not one of the tiny world's.
    """
    seen = describe(image)
    return seen is not None and seen.caption == caption


def judge_shares(seen: list[str], captions: list[str]) -> dict[str, float]:
    """Shares of pictures that show their own caption, and that of the next picture.

    `seen` holds the caption of what `describe` gives for each picture, "" for None. Pictures whose
    next caption equals their own are left out of the second share, which is a baseline: it is near
    0 for pictures that follow their captions.
    """
    own = [shown == caption for shown, caption in zip(seen, captions, strict=True)]
    nexts = zip(seen, captions, captions[1:] + captions[:1], strict=True)
    others = [shown == other for shown, caption, other in nexts if other != caption]
    return {"judge": float(np.mean(own)), "judge_shuffled": float(np.mean(others))}


def describe(image: np.ndarray) -> Attributes | None:
    """What a picture (64, 64, 3) RGB, uint8 or float in [0, 1], shows.

    None where it is not a scene of the tiny world.
    """
    objects = find_objects(image)
    if objects is None or len(objects) != 2:
        return None
    a, b = objects
    across, down = abs(a.x - b.x), abs(a.y - b.y)
    relation = "left of" if across > down else "above"
    first, second = sorted(objects, key=lambda found: found.x if relation == "left of" else found.y)
    # Shapes that overlap much, or stand on a diagonal, are in no relation that a person would name.
    if max(across, down) < 2 * HALF_WIDTH[0] or min(across, down) > 0.7 * max(across, down):
        return None
    return Attributes(first.colour, first.shape, relation, second.colour, second.shape)


def find_objects(image: np.ndarray) -> list[Object] | None:
    """The shapes in a picture (64, 64, 3), one per colour; None where a colour forms no shape."""
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
    """Nearest colour of each pixel, (64, 64) int: index into COLOURS, or len(COLOURS) for grey."""
    pixels = image.astype(np.float64) * (1 if image.dtype == np.uint8 else 255)
    palette = np.array([*COLOURS.values(), *([grey] * 3 for grey in GREYS)], dtype=np.float64)
    # |pixel - colour|^2 without |pixel|^2, which is the same for every colour
    distances = np.square(palette).sum(axis=1) - 2 * (pixels @ palette.T)
    return np.minimum(distances.argmin(axis=-1), len(COLOURS))


def _shape_of(mask: np.ndarray) -> tuple[str, float, float] | None:
    """Shape and centre (x, y) of a mask (64, 64) bool; None where no ideal shape fits it."""
    area = float(mask.sum())
    if not MIN_AREA <= area <= MAX_AREA:
        return None
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean()), float(rows.mean())
    # half a square's side or a circle's radius, from the area
    half_widths = {"square": area**0.5 / 2, "circle": (area / np.pi) ** 0.5}
    overlaps = {
        shape: _overlap(mask, coverage(shape, x, y, half_widths[shape]) >= 0.5) for shape in SHAPES
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best, x, y) if overlaps[best] >= MIN_OVERLAP else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum())
