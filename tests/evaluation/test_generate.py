"""Writing pictures as they are drawn."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from sd_perf import memory
from sd_perf.config import Config, DataConfig
from sd_perf.errors import UserError
from sd_perf.evaluation.generate import generate, save_pictures


def test_pictures_are_saved_as_they_come(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]

    def draw():
        yield torch.zeros(2, 3, 4, 4)
        assert [path.exists() for path in paths] == [True, True, False, False]
        yield torch.ones(2, 3, 4, 4)

    save_pictures(chain.from_iterable(draw()), paths)
    assert [np.asarray(Image.open(path)).max() for path in paths] == [0, 0, 255, 255]


def test_what_cannot_be_allocated_is_said_before_it_is_drawn(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    config = Config(data=DataConfig(format="synthetic", latent_size=64))
    with pytest.raises(UserError, match=r"^drawing 3 pictures of 512x512 pixels .* fewer"):
        next(generate(torch.nn.Linear(1, 1), None, None, ["a"] * 3, config=config, seed=0))
