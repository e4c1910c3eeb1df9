"""How a picture becomes the square that training sees: what is cut, and what is too small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sd_perf.data.augmentation import draw_views
from sd_perf.data.resize import resize_and_crop

Crop = Literal["center", "random", "none"]
"""the part of a picture that is taken: its middle, one drawn along its longer side, or all of it,
which takes a square picture"""
Small = Literal["refuse", "enlarge"]
"""what becomes of pictures whose shorter side is below the square's"""


class FramingError(ValueError):
    """A picture that is not taken as it is: `kind` says why, in short.

    The message goes on from the picture's name.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Framing:
    """How pictures are brought to `size` rows and columns, pixels."""

    size: int
    crop: Crop = "center"
    small: Small = "refuse"
    background: str = "white"
    """the colour that transparent pictures are laid on, as Pillow names it"""
    seed: int = 0
    """of random crops"""

    def apply(self, pixels: np.ndarray, number: int) -> torch.Tensor:
        """A picture (H, W, 3) uint8 as (3, size, size) float32, see `resize_and_crop`.

        `number` is the picture's in its data set: the same one is always cut at the same place, as
        training cuts the one at that position.
        Raises FramingError for a picture that is too small, or is to be cut and may not be.
        """
        height, width, _ = pixels.shape
        if min(height, width) < self.size and self.small == "refuse":
            raise FramingError(
                "too small",
                f"has {width}x{height} pixels, too few for {self.size}x{self.size}; "
                "--small enlarge takes it",
            )
        if self.crop == "none" and height != width:
            raise FramingError(
                "not square",
                f"has {width}x{height} pixels, which are no square; --crop center takes the middle",
            )
        is_random = self.crop == "random"
        [view] = draw_views(self.seed, np.array([number]), flip=False, crop=is_random)
        return resize_and_crop(pixels, self.size, view)
