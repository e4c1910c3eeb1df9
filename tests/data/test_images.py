"""Decoding, resizing and cropping of images: the benchmark's transform, and people's pictures."""

from __future__ import annotations

import io
import random
import struct

import numpy as np
import pytest
import torch

from sd_perf.data import images
from sd_perf.data.images import load_image, load_picture
from sd_perf.errors import DataError
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def bicubic(length: int, new: int) -> np.ndarray:
    """Weights (new, length), float64, of antialiased bicubic interpolation with a = -0.5."""
    scale = length / new
    distance = np.arange(length)[None] + 0.5 - (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(distance) / max(scale, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_crop_is_centred_and_resize_antialiased(tmp_path):
    ramp = np.zeros((10, 25, 3), np.uint8)
    ramp[:] = np.arange(25)[None, :, None] * 10
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = load_image(tmp_path / "ramp.png", 10)
    assert image.shape == (3, 10, 10) and image.dtype == torch.float32
    # 15 columns too many: 7.5 is rounded to the even 8
    assert torch.equal(image[0, 0], torch.arange(8, 18) * 10 / 255)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert float((load_image(tmp_path / "stripes.png", 16) - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize(("surplus", "left"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2)])
def test_offset_of_the_crop(surplus, left, tmp_path):
    pixels = noise(8, 8 + surplus)
    image = load_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 8)
    expected = torch.from_numpy(pixels[:, left : left + 8]).permute(2, 0, 1) / 255
    assert torch.equal(image, expected)


@pytest.mark.parametrize(("height", "width"), [(50, 37), (37, 67), (9, 13)])
def test_the_benchmarks_transform(height, width, tmp_path):
    pixels, size = noise(height, width), 16
    image = load_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), size)
    short = min(height, width)
    rows, columns = bicubic(height, height * size // short), bicubic(width, width * size // short)
    resized = np.einsum("ih,hwc,jw->cij", rows, pixels / 255, columns)
    top, left = (
        surplus // 2 + (surplus % 4 == 3) for surplus in (len(rows) - size, len(columns) - size)
    )
    expected = resized[:, top : top + size, left : left + size]
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
    if short < size:
        assert image.min() < 0 and image.max() > 1  # not clipped


def test_pictures_of_raw_shards(tmp_path):
    """Not turned as EXIF says; the range of the benchmark or of the encoder's training."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = saved(Image.fromarray(noise(20, 30)), tmp_path / "a.png", exif=exif)
    benchmarks = load_picture(path.read_bytes(), 16, "benchmark")
    assert torch.equal(benchmarks, load_image(path, 16, upright=False))
    assert not torch.equal(benchmarks, load_image(path, 16))
    assert torch.equal(load_picture(path.read_bytes(), 16, "correct"), benchmarks * 2 - 1)
    turned = load_picture(path.read_bytes(), 16, "benchmark", upright=True)
    assert torch.equal(turned, load_image(path, 16))


def test_photographs_as_torchvision_transforms_them(real_data):
    define_missing_torchvision_ops()
    transforms = pytest.importorskip("torchvision.transforms", reason="needs torchvision")
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize(512, interpolation=bicubic, antialias=True),
            transforms.CenterCrop(512),
        ]
    )
    photographs = sorted((real_data / "coco_ccby" / "images").glob("*.jpg"))[:12]
    for path in photographs:
        expected = theirs(Image.open(path).convert("RGB"))
        ours = load_image(path, 512, upright=False)  # sums of another order
        assert float((ours - expected).abs().max()) < 2e-6, path.name


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": "4:1:1"}, {"progressive": True}, {"quality": 20}],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decoded_by_simplejpeg(tmp_path, monkeypatch, mode, options):
    """They are Pillow's, bit by bit; what it does not take goes to Pillow."""
    pytest.importorskip("simplejpeg", reason="needs simplejpeg: pip install 'sd-perf[jpeg]'")
    smooth = Image.fromarray(noise(9, 12)).resize((71, 50), Image.Resampling.BICUBIC)
    path = saved(smooth.convert(mode), tmp_path / "a.jpg", **options)
    quick = load_picture(path.read_bytes(), 16, "correct")
    assert (images._quick_jpeg(path.read_bytes()) is None) == (mode == "CMYK")
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(quick, load_picture(path.read_bytes(), 16, "correct"))


@pytest.mark.parametrize("cut", [2, 3, 20, 300, -300, -2])
def test_damaged_jpegs_are_pillows_to_judge(tmp_path, monkeypatch, cut):
    pytest.importorskip("simplejpeg", reason="needs simplejpeg: pip install 'sd-perf[jpeg]'")
    data = saved(Image.fromarray(noise(50, 71)), tmp_path / "a.jpg").read_bytes()[:cut]

    def outcome():
        try:
            return load_picture(data, 16, "correct")
        except DataError as error:
            return str(error)

    with_it = outcome()
    monkeypatch.setattr(images, "simplejpeg", None)
    without = outcome()
    same = torch.equal if isinstance(without, torch.Tensor) else str.__eq__
    assert same(with_it, without)


def test_squash_keeps_the_whole_picture(tmp_path):
    pixels = noise(20, 50)
    image = load_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 10, fit="squash")
    expected = np.einsum("ih,hwc,jw->cij", bicubic(20, 10), pixels * 1.0, bicubic(50, 10))
    # Pillow rounds twice, after either axis.
    np.testing.assert_allclose(image.numpy() * 255, expected.clip(0, 255), atol=1.01)
    assert torch.equal(image * 255, (image * 255).round())
    path = saved(Image.fromarray(noise(16, 16)), tmp_path / "square.png")
    assert torch.equal(load_image(path, 16, fit="squash"), load_image(path, 16))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_orientation(orientation, upright, tmp_path):
    pixels, exif = noise(16, 16), Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    for image, expected in (
        (load_image(path, 16), upright(pixels)),
        (load_image(path, 16, upright=False), pixels),
    ):
        assert np.array_equal((image * 255).round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("RGBA", "tif"), ("RGB", "jpg")])
def test_orientation_of_any_kind_of_file(mode, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    black_above = Image.new(mode, (16, 16), 0 if mode == "I;16" else (0, 0, 0, 255)[: len(mode)])
    black_above.paste(65535 if mode == "I;16" else "white", (0, 8, 16, 16))
    image = load_image(saved(black_above, tmp_path / f"a.{suffix}", exif=exif), 16)
    assert (image[:, 0] > 0.99).all() and (image[:, -1] < 0.01).all()


def damaged_exif(seed: int) -> bytes:
    """EXIF data that turn an image by 180 degrees, with a few wrong bytes behind that tag."""
    draw, exif = random.Random(seed), Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0131] = 3, 72.0, "a program"
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    data = bytearray(exif.tobytes())
    behind = 28  # "Exif", the TIFF header, how many tags there are, and the first: orientation
    for _ in range(draw.choice((1, 4, 16))):
        data[draw.randrange(behind, len(data))] = draw.choice((0, 1, 2, 5, 12, 255))
    return bytes(data)


def test_tags_that_do_not_matter_may_be_damaged(tmp_path):
    """Pillow's exif_transpose, which writes all of them anew, raises errors of many kinds."""
    above = Image.new("RGB", (16, 16))
    above.paste("white", (0, 8, 16, 16))
    turned = load_image(saved(above.transpose(Image.Transpose.ROTATE_180), tmp_path / "b.jpg"), 16)
    for seed in range(100):
        path = saved(above, tmp_path / "a.jpg", exif=damaged_exif(seed))
        assert (load_image(path, 16) - turned).abs().max() < 0.05, seed


def test_exif_data_that_cannot_be_read(tmp_path, monkeypatch):
    """Which bytes lead to an error differs between Pillow's versions: any error will do."""

    def damage(*_):
        raise struct.error("unpack requires a buffer of 12 bytes")

    path = saved(Image.new("RGB", (16, 16)), tmp_path / "a.jpg", exif=damaged_exif(0))
    monkeypatch.setattr(Image.Exif, "get", damage)
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded .*EXIF data are damaged"):
        load_image(path, 16)
    assert load_image(path, 16, upright=False).shape == (3, 16, 16)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey(suffix, tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257 + 3
    levels[-1, -1] = 65535
    path = saved(Image.fromarray(levels), tmp_path / f"a.{suffix}")
    image = load_image(path, 16)
    assert torch.equal(image[0] * 255, torch.arange(256).reshape(16, 16).float())
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused(mode, tmp_path):
    path = saved(Image.new(mode, (16, 16), 1), tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif has pixels of mode {mode}.*8 bits"):
        load_image(path, 16)


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgba = np.dstack([np.full((16, 16, 3), (200, 40, 0), np.uint8), alpha])
    image = load_image(saved(Image.fromarray(rgba), tmp_path / "a.png"), 16) * 255
    share = alpha[None] / 255
    expected = np.array([200, 40, 0])[:, None, None] * share + 255 * (1 - share)
    np.testing.assert_allclose(image.numpy(), expected, atol=0.51)
    grey = np.dstack([np.full((16, 16), 90, np.uint8), alpha])
    image = load_image(saved(Image.fromarray(grey), tmp_path / "b.png"), 16) * 255
    np.testing.assert_allclose(image[0].numpy(), 90 * share[0] + 255 * (1 - share[0]), atol=0.51)
    palette = Image.fromarray(np.zeros((16, 16), np.uint8), mode="L").convert("P")
    image = load_image(saved(palette, tmp_path / "c.png", transparency=0), 16)
    assert (image == 1).all()


def test_damage_is_one_sentence():
    for data in (b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"II*\0" + b"\xff" * 60):
        with pytest.raises(DataError, match="the image cannot be decoded"):
            load_image(io.BytesIO(data), 16)
