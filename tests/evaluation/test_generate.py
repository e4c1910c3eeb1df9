"""Writing pictures as they are drawn."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from sd_perf.evaluation.generate import save_pictures


def test_pictures_are_saved_as_they_come(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]

    def draw():
        yield torch.zeros(2, 3, 4, 4)
        assert [path.exists() for path in paths] == [True, True, False, False]
        yield torch.ones(2, 3, 4, 4)

    save_pictures(draw(), paths)
    assert [np.asarray(Image.open(path)).max() for path in paths] == [0, 0, 255, 255]
