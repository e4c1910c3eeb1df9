"""The benchmark's transform of its training images: bicubic resize, then the centre.

It is torchvision's `Resize(size, BICUBIC, antialias=True)` on a float tensor, then
`CenterCrop(size)`. A resize is a banded matrix per axis. Applied as such, to the rows and columns
that the crop keeps and on bytes as they were decoded, it takes half the time of torch's own.

Shape letters: H and W rows and columns of the image, pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class View:
    """What is seen of a picture."""

    flip: bool = False
    """left and right exchanged"""
    crop: float | None = None
    """where along its longer side the square is cut out, in [0, 1); None: in the centre"""


AS_IT_IS = View()
"""the benchmark's: the centre"""


def geometry(
    shape: Sequence[int], size: int, crop: float | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What becomes of an image of this shape (H, W): (rows, columns) of it resized, and the first
    ones of the square of side `size` that is cut out; `crop` is `View.crop`.

    The shorter side becomes `size`, and the longer one is rounded down.
    """
    rows, columns = (side * size // min(shape) for side in shape)
    return (rows, columns), (_offset(rows, size, crop), _offset(columns, size, crop))


def resize_and_crop(pixels: np.ndarray, size: int, view: View = AS_IT_IS) -> torch.Tensor:
    """Resize the shorter side of an image (H, W, 3) uint8 to `size` and crop a square.

    Returns (3, size, size) float32, perhaps not contiguous: bytes divided by 255, nothing rounded
    or clipped. The longer side is rounded down, and the offset of a crop in the centre is half the
    surplus, rounded to the nearest even number.
    """
    square = _square(pixels, size, view.crop)
    return square.flip(-1) if view.flip else square


def _square(pixels: np.ndarray, size: int, place: float | None) -> torch.Tensor:
    """`resize_and_crop` without a flip; `place` is `View.crop`."""
    image, short = torch.from_numpy(pixels), min(pixels.shape[:2])
    (height, width), (top, left) = geometry(pixels.shape[:2], size, place)
    if short == size:
        kept = image[top : top + size, left : left + size]
        return kept.permute(2, 0, 1).contiguous().float() / 255
    top, rows = _band(pixels.shape[0], height, size, top)
    left, columns = _band(pixels.shape[1], width, size, left)
    kept = image[top : top + rows.shape[1], left : left + columns.shape[1]]
    across = torch.sparse.mm(columns, kept.permute(1, 2, 0).contiguous().float().flatten(1))
    down = across.view(size, 3, -1).permute(2, 1, 0).contiguous()
    return torch.sparse.mm(rows, down.flatten(1)).view(size, 3, size).permute(1, 0, 2)


def _offset(side: int, size: int, place: float | None) -> int:
    """Where the crop begins: in the middle, or any of side - size + 1 places alike often."""
    return round((side - size) / 2) if place is None else int(place * (side - size + 1))


@functools.lru_cache(maxsize=256)
def _band(length: int, new: int, size: int, first: int) -> tuple[int, torch.Tensor]:
    """The rows (size, kept) of a resize from `length` to `new` that a crop from `first` on keeps,
    and the first of the `kept` places they read.

    Sparse float32, in torch's own arithmetic (UpSampleKernel.cpp, bicubic with a = -0.5); divided
    by the square root of 255, since an image goes through two.
    """
    scale = np.float32(length) / np.float32(new)
    wide = max(scale, np.float32(1))
    centers = (float(scale) * (np.arange(first, first + size) + 0.5)).astype(np.float32)
    begins = np.maximum((centers - 2 * wide + np.float32(0.5)).astype(np.int64), 0)
    ends = np.minimum((centers + 2 * wide + np.float32(0.5)).astype(np.int64), length)
    places = begins[:, None] + np.arange((ends - begins).max())
    distances = (places - centers[:, None] + np.float32(0.5)).astype(np.float32) / wide
    is_tap = places < ends[:, None]
    weights = np.where(is_tap, _cubic(np.abs(distances)), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    top = int(begins.min())
    indices = np.stack([np.nonzero(is_tap)[0], places[is_tap] - top])
    values = (weights[is_tap] / 255**0.5).astype(np.float32)
    shape = size, int(ends.max()) - top
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(indices),
        torch.from_numpy(values),
        shape,
        check_invariants=True,
        is_coalesced=True,
    )
    return top, matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys's cubic convolution kernel with a = -0.5 at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
