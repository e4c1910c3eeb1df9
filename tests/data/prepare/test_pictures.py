"""Pictures as training will see them: framed, on a colour, each set of bytes once."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.data.images import is_colour, load_image, load_pixels
from sd_perf.data.prepare.captioned_images import CaptionedImage
from sd_perf.data.prepare.framing import Framing, FramingError
from sd_perf.data.prepare.pictures import read_pictures

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
RAMP = np.tile(np.arange(96, dtype=np.uint8)[None, :, None], (16, 1, 3))
"""a picture (16, 96, 3) whose columns tell where they are"""


def named(*paths: Path) -> list[CaptionedImage]:
    return [CaptionedImage(path, ("x",), str(path)) for path in paths]


def test_random_crops_lie_along_the_longer_side():
    """The same number, the same place; together they reach from end to end."""
    cuts = [Framing(16, "random", seed=7).apply(RAMP, number) * 255 for number in range(40)]
    lefts = [round(float(cut[0, 0, 0])) for cut in cuts]
    for left, cut in zip(lefts, cuts, strict=True):
        torch.testing.assert_close(cut[0, 0], torch.arange(left, left + 16.0))
    assert min(lefts) < 10 and max(lefts) > 70 and 30 < sum(lefts) / 40 < 50
    again = Framing(16, "random", seed=7).apply(RAMP, 5)
    other = Framing(16, "random", seed=8).apply(RAMP, 5)
    assert torch.equal(again * 255, cuts[5]) and not torch.equal(other * 255, cuts[5])
    upright = Framing(16, "random", seed=7).apply(RAMP.transpose(1, 0, 2), 5)
    assert torch.equal(upright, again.transpose(1, 2))


def test_what_may_not_be_cut_or_enlarged():
    with pytest.raises(FramingError, match=r"has 96x16 pixels, which are no square") as error:
        Framing(16, "none").apply(RAMP, 0)
    assert error.value.kind == "not square"
    assert Framing(16, "none").apply(RAMP[:, :16], 0).shape == (3, 16, 16)
    with pytest.raises(FramingError, match="96x16 pixels, too few for 32x32; --small enlarge"):
        Framing(32).apply(RAMP, 0)
    assert Framing(32, small="enlarge").apply(RAMP, 0).shape == (3, 32, 32)


def test_pictures_in_their_order(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").touch()
    (tmp_path / "d.png").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "e.png")
    paths = [tmp_path / f"{name}.png" for name in "abacde"]
    found = list(read_pictures(named(*paths), Framing(16), threads=2))
    kinds = ["", "duplicate", "", "unreadable", "unreadable", "too small"]
    assert [picture.kind for picture in found] == kinds
    assert [picture.sample.path for picture in found] == paths
    assert found[1].fault == f"{paths[1]} has the same bytes as {paths[0]}"
    assert found[5].fault.startswith(f"{paths[5]} has 4x4 pixels")
    assert torch.equal(found[2].pixels, load_image(paths[0], 16))


def test_transparency_on_a_colour():
    stream = io.BytesIO()
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(stream, "png")
    for colour, right in (("white", 255), ("#ff8000", [255, 128, 0])):
        stream.seek(0)
        assert (load_pixels(stream, "it", background=colour) == right).all()
    assert is_colour("teal") and not is_colour("no colour") and not is_colour("#11223344")


@pytest.mark.parametrize("format", ["AVIF", "BMP", "GIF", "JPEG2000", "QOI", "TIFF", "WEBP"])
def test_formats(format):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    stream = io.BytesIO()
    later = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
    colour = (200, 100, 50)
    Image.new("RGB", (8, 8), colour).save(stream, format, **(later if format == "GIF" else {}))
    stream.seek(0)
    assert np.abs(load_pixels(stream, "it").astype(int) - colour).max() <= 4
