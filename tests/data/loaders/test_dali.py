"""The DALI loader gives what the portable loader gives: order, resuming, bad samples, pixels."""

from __future__ import annotations

import io
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders import dali as dali_loader
from sd_perf.data.loaders.dali import DaliLoader, picture_pipeline
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.errors import BadSampleError, ConfigError, DataError
from tests.data.test_shards import write_tar

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
SIZE = 64
SHAPES = [(64, 64), (64, 67), (80, 101), (97, 80), (48, 75), (130, 90), (200, 333), (66, 64)]
"""rows and columns; the surplus of the longer side has every remainder by 4"""


@pytest.fixture
def dali() -> None:
    """Skips without DALI, which is installed for slow tests alone: mark what asks for it so."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'sd-perf[dali]'")


def photograph(rows: int, columns: int) -> np.ndarray:
    """A smooth picture (rows, columns, 3) uint8."""
    y, x = np.mgrid[:rows, :columns][..., None] / 9.0
    phase = np.array([0.0, 1.0, 2.0])
    return (127 + 60 * np.sin(x + phase) + 60 * np.cos(y * 0.7 + phase)).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def config_of(folder: Path, pictures: list[bytes], extension: str = "jpg", **fields) -> DataConfig:
    files = []
    for number, picture in enumerate(pictures):
        files += [(f"{number:03d}.{extension}", picture), (f"{number:03d}.txt", b"a cat")]
    write_tar(folder / "shards" / "0.tar", files)
    return DataConfig(
        format="raw",
        loader="dali",
        path=str(folder / "shards"),
        latent_size=SIZE // 8,
        autoencoder="unused",
        workers=2,
        **fields,
    )


def take(kind, config, position: int = 0, count: int = 4, world: int = 1) -> list[Batch]:
    batches = []
    for rank in range(world):
        split = {"micro_batch_size": 4 // world, "rank": rank, "world_size": world}
        stream = kind(config, LoaderOptions(seed=3, global_batch_size=4, **split)).batches(position)
        batches += islice(stream, count)
        stream.close()
    return batches


def pictures() -> list[bytes]:
    return [encoded(photograph(*shape), quality=95) for shape in SHAPES]


@pytest.mark.slow
@pytest.mark.parametrize("image_range", ["benchmark", "correct"])
@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "flip and crop"])
def test_pixels_of_the_portable_loader(dali, tmp_path, image_range, changed):
    """DALI decodes the same bytes. Its resize differs at edges, where torch's drops what is outside
    of the picture and DALI's repeats the edge."""
    more = {"image_range": image_range, "random_flip": changed, "random_crop": changed}
    config = config_of(tmp_path, pictures(), **more)
    unit = 1 / 255 if image_range == "benchmark" else 2 / 255
    for ours, theirs in zip(take(DaliLoader, config), take(PortableLoader, config), strict=True):
        assert torch.equal(ours.sample_indices, theirs.sample_indices)
        assert ours.captions == theirs.captions and ours.replacements == []
        apart = (ours.pixels - theirs.pixels).abs() / unit
        assert ours.pixels.shape == (4, 3, SIZE, SIZE)
        assert float(apart[..., 3:-3, 3:-3].max()) < 0.05 and float(apart.max()) < 8


@pytest.mark.slow
def test_order_and_resume(dali, tmp_path):
    config = config_of(tmp_path, pictures())
    whole = take(DaliLoader, config, count=5)
    for step in range(1, 5):
        tail = take(DaliLoader, config, position=4 * step, count=5 - step)
        for ours, again in zip(whole[step:], tail, strict=True):
            assert torch.equal(ours.pixels, again.pixels)
    parts = take(DaliLoader, config, count=5, world=2)
    rows = {int(i): p for b in parts for i, p in zip(b.sample_indices, b.pixels, strict=True)}
    for batch in whole:
        for index, row in zip(batch.sample_indices, batch.pixels, strict=True):
            assert torch.equal(rows[int(index)], row)


BROKEN = {
    "cut": encoded(photograph(90, 70))[:700],
    "cut late": encoded(photograph(90, 70))[:-400],
    "junk": b"\xff\xd8\xff" + bytes(500),
    "empty": b"",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_picture_costs_its_batch_alone(dali, tmp_path, kind):
    some = pictures()
    some[2] = BROKEN[kind]
    with pytest.raises(BadSampleError, match=r"sample 002 in 0\.tar: .*decoded"):
        take(DaliLoader, config_of(tmp_path, some))
    config = config_of(tmp_path, some, max_bad_samples=9)
    ours, theirs = take(DaliLoader, config), take(PortableLoader, config)
    assert [b.replacements for b in ours] == [b.replacements for b in theirs]
    bad = [index for index, batch in enumerate(ours) if batch.replacements]
    assert bad == [b for b in range(4) if theirs[b].replacements] and 0 < len(bad) < 4
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        same = torch.equal(mine.pixels, other.pixels)
        assert same == (index in bad)  # the pipeline lives on: other batches are DALI's


@pytest.mark.slow
def test_pictures_that_need_our_rules(dali, tmp_path):
    """Transparent, with a palette, of 16 bits: as the portable loader decodes them, bit by bit."""
    rgb = photograph(80, 90)
    alpha = np.concatenate([rgb, rgb[..., :1]], axis=2)
    sixteen = (rgb[..., 0].astype(np.uint16)) * 257
    palette = io.BytesIO()
    Image.fromarray(rgb).convert("P").save(palette, "PNG")
    some = [encoded(alpha, "PNG"), encoded(sixteen, "PNG"), palette.getvalue()]
    config = config_of(tmp_path, [*some, encoded(rgb, "PNG"), encoded(rgb[..., 0], "PNG")], "png")
    for ours, theirs in zip(take(DaliLoader, config), take(PortableLoader, config), strict=True):
        assert float((ours.pixels - theirs.pixels).abs().max()) < 8 / 127.5
        for row, index in enumerate(ours.sample_indices.tolist()):
            loader = DaliLoader(config, LoaderOptions(3, 4, 4))
            if loader._order.sample(index) < 3:
                assert torch.equal(ours.pixels[row], theirs.pixels[row])


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "device"), [("cpu", "cpu"), ("mixed", "gpu")])
def test_operators_by_device(dali, decoder, device):
    """DALI accepts the graph, and all from the decoder on is on its device. Needs no GPU."""
    pipeline = picture_pipeline(4, SIZE, "correct", decoder)
    assert len(pipeline.serialize()) > 1000
    specs = {each.name.strip("_0123456789"): each.spec for each in pipeline._ops}
    inputs = ["encoded", "sides", "corner", "flip"]
    assert sorted(specs) == sorted([*inputs, "Image", "Resize", "Slice", "CropMirrorNormalize"])
    for name, spec in specs.items():
        assert spec.OutputDevice(0) == ("cpu" if name in inputs else device)
        # What says where to cut, and whether to flip, is asked for on the host by all.
        given = [spec.InputDevice(place) for place in range(spec.NumInput())]
        assert given[1:] in ([], ["cpu"]) and given[:1] in ([], ["cpu"], [device])


class Stream:
    """Stands in for a stream of a GPU, and notes what happens in which order."""

    def __init__(self, device: torch.device, seen: list[str]) -> None:
        self.device, self.seen = device, seen

    def __enter__(self) -> None:
        self.seen.append("enter")

    def __exit__(self, *_) -> None:
        self.seen.append("leave")

    def synchronize(self) -> None:
        self.seen.append("synchronize")


def test_a_gpu_decodes_on_a_stream_of_the_thread(tmp_path, monkeypatch):
    """With stand-ins for DALI and the GPU: who is called, on which stream, in which order."""
    gpu, seen, made = torch.device("cuda", 3), [], []
    empty, copy = torch.empty, torch.Tensor.copy_

    class Pipeline:
        def __init__(self, size, side, image_range, decoder) -> None:
            made.append((size, side, image_range, decoder))

        def run(self, stream, encoded, sides, corner, flip):
            assert isinstance(stream, Stream) and stream.device == gpu
            assert sides.dtype == np.float32 and corner.dtype == np.int32 and len(flip) == 4
            seen.append("run")
            return [self]

        def as_tensor(self) -> torch.Tensor:
            return torch.arange(4.0)[:, None, None, None].expand(4, 3, SIZE, SIZE).contiguous()

    def allocate(*shape, device=None, **_):
        seen.append(f"allocate on {device}")
        return empty(*shape)

    def noted_copy(target, source, non_blocking=False):
        seen.append("copy")
        return copy(target, source)

    monkeypatch.setitem(sys.modules, "nvidia.dali", sys.modules[__name__])
    monkeypatch.setattr(dali_loader, "picture_pipeline", Pipeline)
    monkeypatch.setattr(torch.Tensor, "copy_", noted_copy)
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(device, seen))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    loader = DaliLoader(config_of(tmp_path, pictures()), LoaderOptions(3, 4, 4, device=gpu))
    for step in range(2):
        batch = loader.make(np.arange(4 * step, 4 * step + 4))
        assert batch.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert made == [(4, SIZE, "correct", "mixed")]  # one pipeline of this thread
    on_stream = ["allocate on cuda:3", "run", *4 * ["copy"]]
    assert seen == 2 * ["enter", *on_stream, "leave", "synchronize"]


def test_memory_of_a_gpu_batch_waits_for_the_step(tmp_path, monkeypatch):
    """The step's stream is noted where the batch is taken, before the step can begin."""
    noted = []
    pixels = SimpleNamespace(is_cuda=True, device="cuda:3", record_stream=noted.append)
    batch = Batch(torch.arange(4), None, [], pixels=pixels)
    monkeypatch.setitem(sys.modules, "nvidia.dali", sys.modules[__name__])
    monkeypatch.setattr(DaliLoader, "make", lambda self, positions: batch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the step's on {device}")
    stream = DaliLoader(config_of(tmp_path, pictures()), LoaderOptions(3, 4, 4)).batches(0)
    assert next(stream) is batch and noted == ["the step's on cuda:3"]
    stream.close()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(dali, tmp_path, monkeypatch):
    monkeypatch.setattr(dali_loader, "picture_pipeline", partial(mixed, picture_pipeline))
    with pytest.raises(DataError, match=r"DALI decodes none .*GPU.*data\.loader to portable"):
        take(DaliLoader, config_of(tmp_path, pictures()))


def mixed(pipeline_of, size, side, image_range, decoder):
    return pipeline_of(size, side, image_range, "mixed")


def test_dali_that_decodes_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", sys.modules[__name__])
    config = config_of(tmp_path, pictures())

    def refuse(*_):
        raise RuntimeError("Critical error in pipeline")

    monkeypatch.setattr(DaliLoader, "_decode", refuse)
    with pytest.raises(DataError, match=r"DALI decodes none .*Critical.*data\.loader to portable"):
        take(DaliLoader, config)


def test_without_dali(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"needs NVIDIA DALI .*sd-perf\[dali\]"):
        DaliLoader(config_of(tmp_path, pictures()), LoaderOptions(3, 4, 4))
