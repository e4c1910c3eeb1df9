"""Decoding and cropping of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd_perf.data.images import load_image

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def test_crop_is_centred_and_resize_antialiased(tmp_path):
    ramp = np.zeros((10, 25, 3), np.uint8)
    ramp[:] = np.arange(25)[None, :, None] * 10
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = load_image(tmp_path / "ramp.png", 10)
    assert image.shape == (3, 10, 10) and image.dtype == torch.float32
    # 15 columns too many: 7 go on the left
    assert torch.equal(image[0, 0], torch.arange(7, 17) * 10 / 255)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert float((load_image(tmp_path / "stripes.png", 16) - 0.5).abs().max()) < 0.05


def test_orientation_and_modes(tmp_path):
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "grey.png", exif=exif)
    image = load_image(tmp_path / "grey.png", 16)
    assert image.shape == (3, 16, 16) and (image[:, 0] == 1).all() and (image[:, -1] == 0).all()
