"""Raw shards to shards of moments, shard by shard and under the same names.

As in the benchmark's conversion, a picture is replaced by its moments, and its caption and metadata
stay as they are; samples are in the order of their keys.

Shape letters: B images, P their rows and columns in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sd_perf.children import worker_pool
from sd_perf.data.digests import digest, write_digests
from sd_perf.data.formats import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES
from sd_perf.data.images import ImageRange, load_picture
from sd_perf.data.samples import parse_caption
from sd_perf.data.shard_writer import add_sample, moments_bytes, start_shard
from sd_perf.data.shards import find_files
from sd_perf.data.tar_files import group_by_key
from sd_perf.data.threads import map_ahead
from sd_perf.errors import DataError
from sd_perf.files import (
    disk_errors,
    is_absent,
    json_lines,
    misfit,
    opened_untrusted,
    read_json,
    write_json,
    write_text,
    written_aside,
)
from sd_perf.models.readers import read_autoencoder, read_encoder
from sd_perf.models.vae import PIXELS_PER_LATENT

RECORDS = "conversion"
"""folder beside the shards: settings.json, and a record of each shard"""
_MAX_TEXT = 2**20
"""longest caption or metadata of a sample, bytes; training has a limit of its own for captions"""
_MAKE_ROOM = "make room or choose another folder"
_RECORD = {"source": [int], "bytes": int, "samples": int, "sha256": str, "left_out": [dict]}

Encoder = Callable[[torch.Tensor], torch.Tensor]
Place = tuple[int, int]
"""byte offset and size of a file in a shard"""


@dataclass(frozen=True)
class Settings:
    """What the moments of a set of shards depend on: all of them must be made with the same."""

    autoencoder_sha256: str
    pixels: int
    """rows and columns of the encoded images, P"""
    image_range: ImageRange


class Sample(NamedTuple):
    """A sample of a raw shard, read and decoded."""

    key: str
    pixels: torch.Tensor | None
    """(3, P, P) float32; None where it is left out"""
    texts: dict[str, bytes]
    """its .txt and, where there is one, .json"""
    fault: str
    """why it is left out; else empty"""


@dataclass(frozen=True)
class Result:
    """What a conversion gave."""

    shards: int
    samples: int
    left_out: int
    """pictures that cannot be decoded; they are listed in left_out.jsonl"""
    faults: list[str]
    """a sentence for each shard that cannot be read"""


def convert(
    source: Path,
    output: Path,
    autoencoder: Path,
    *,
    pixels: int,
    image_range: ImageRange,
    devices: list[str],
    batch_size: int = 8,
    threads: int = 4,
    max_pixels: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Encode every raw shard of the folder `source` into a shard of the same name in `output`.

    Each of `devices`, such as "cuda:0", gets a process where there are several, and `threads` that
    decode pictures of at most `max_pixels` (None: the limit of `load_picture`). A shard is written
    whole or not at all, and one that is there already is kept, unless its source has changed.
    Pictures that cannot be decoded are left out and listed. Shards that cannot be read are told in
    the result, and the others converted. `progress` is called with the shards that are done, and of
    how many.

    Raises DataError where `source` has no shards, `output` has shards that were not made by this
    function with these settings, or the encoder's output cannot be used.
    """
    sources = find_files(source)
    if not sources:
        raise DataError(f"{source}: holds no *.tar files; name the folder of the raw shards")
    if not autoencoder.is_file():
        raise DataError(f"{autoencoder}: no such file; name the file of the autoencoder")
    if output.exists() and output.samefile(source):
        raise DataError(f"{output}: is the folder that is read; write to another one")
    settings = Settings(digest(autoencoder), pixels, image_range)
    with disk_errors(output, _MAKE_ROOM, DataError):
        (output / RECORDS).mkdir(parents=True, exist_ok=True)
        _begin(output, settings)
    left = [path for path in sources if read_record(output, path) is None]
    work = partial(
        _convert_part,
        output,
        autoencoder,
        settings,
        batch_size=batch_size,
        threads=threads,
        max_pixels=max_pixels,
    )

    def report() -> None:
        progress(sum(read_record(output, path) is not None for path in sources), len(sources))

    faults = _in_processes(work, left, devices, report) if left else []
    return _finish(output, sources, faults)


def _in_processes(
    work: Callable[..., list[str]],
    sources: list[Path],
    devices: list[str],
    report: Callable[[], None],
) -> list[str]:
    """Call `work` with a share of the shards for each device; returns the faults of all."""
    if len(devices) == 1:
        return work(devices[0], sources, report)
    shares = [(device, sources[number :: len(devices)]) for number, device in enumerate(devices)]
    with worker_pool(len(devices)) as pool:
        futures = waiting = {pool.submit(work, *share) for share in shares}
        try:
            while waiting:
                waiting = wait(waiting, timeout=1).not_done
                report()
            return [fault for future in futures for fault in future.result()]
        except BaseException:
            # The pool would wait for the shares to end, which may take hours. Drafts of what is
            # killed are removed by the next command that writes there.
            for process in active_children():
                process.kill()
            raise


def _convert_part(
    output: Path,
    autoencoder: Path,
    settings: Settings,
    device: str,
    sources: list[Path],
    report: Callable[[], None] = lambda: None,
    *,
    batch_size: int,
    threads: int,
    max_pixels: int | None,
) -> list[str]:
    """Convert some shards on one device; returns a sentence for each that cannot be read."""
    encoder, faults = _read_encoder(autoencoder, torch.device(device)), []
    for source in sources:
        report()
        try:
            samples = read_samples(source, settings, threads, 2 * batch_size, max_pixels)
            convert_shard(source, samples, output, encoder, settings, batch_size)
        except UnreadableShardError as error:
            faults.append(str(error))
    report()
    return faults


class UnreadableShardError(DataError):
    """A raw shard that cannot be read, or must not be."""


def convert_shard(
    source: Path,
    samples: Iterator[Sample],
    output: Path,
    encoder: Encoder,
    settings: Settings,
    batch_size: int,
) -> None:
    """Write the shard of moments, and then its record."""
    state, target = _state(source), output / source.name
    with disk_errors(target, _MAKE_ROOM, DataError):
        with written_aside(target) as draft:
            count, left_out = _write_tar(draft, source, samples, encoder, settings, batch_size)
            size, sha256 = draft.stat().st_size, digest(draft)
        record = {"source": state, "bytes": size, "samples": count, "sha256": sha256}
        write_json(_record_path(output, source), {**record, "left_out": left_out})


def _write_tar(
    draft: Path,
    source: Path,
    samples: Iterator[Sample],
    encoder: Encoder,
    settings: Settings,
    batch_size: int,
) -> tuple[int, list[dict[str, str]]]:
    """Write the samples with their moments; returns how many, and those that are left out."""
    count, left_out = 0, []
    with start_shard(draft) as tar:
        while batch := list(islice(samples, batch_size)):
            left_out += [{"key": s.key, "error": s.fault} for s in batch if s.fault]
            good = [sample for sample in batch if not sample.fault]
            for sample, moments in encode(source, good, encoder, settings):
                add_sample(tar, sample.key, {"npy": moments, **sample.texts})
            count += len(good)
    return count, left_out


def encode(
    source: Path, samples: list[Sample], encoder: Encoder, settings: Settings
) -> Iterable[tuple[Sample, bytes]]:
    """Samples with the bytes of their .npy files. DataError for moments that cannot be used."""
    if not samples:
        return ()
    images = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
    moments = encoder(images).float().cpu()
    side = settings.pixels // PIXELS_PER_LATENT
    where = f"{source}: samples {samples[0].key} to {samples[-1].key}"
    if tuple(moments.shape) != (len(samples), 8, side, side):
        raise DataError(f"{where}: the encoder gives moments of shape {tuple(moments.shape)}")
    if not torch.isfinite(moments).all():
        raise DataError(f"{where}: the encoder gives NaN or infinite values")
    return zip(samples, map(moments_bytes, moments.numpy()), strict=True)


def read_samples(
    source: Path, settings: Settings, threads: int, ahead: int, max_pixels: int | None = None
) -> Iterator[Sample]:
    """The samples of a raw shard in the order of their keys, decoded by threads.

    Nothing is unpacked to the disk. UnreadableShardError for a shard that is no whole tar file, or
    whose members are links or lie outside of the folder that it would be unpacked to.
    """
    try:
        groups = group_by_key(source)
        with opened_untrusted(source, "fetch it again", DataError) as file:
            read = partial(_read_sample, file.fileno(), settings, max_pixels)
            _require_inside(source, groups)
            yield from map_ahead(
                read, sorted(groups.items()), threads, ahead, lambda: torch.set_num_threads(1)
            )
    except DataError as error:
        raise UnreadableShardError(str(error)) from error


def _require_inside(source: Path, keys: Iterable[str]) -> None:
    for key in keys:
        path = Path(key)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{source}: member {key[:200]} would leave the folder it is unpacked to; the shard "
                "is not img2dataset's, remove it"
            )


def _read_sample(
    shard: int, settings: Settings, max_pixels: int | None, item: tuple[str, dict[str, Place]]
) -> Sample:
    """Read and decode one sample; `shard` is the file descriptor of its shard."""
    key, files = item
    texts: dict[str, bytes] = {}
    try:
        picture = next((files[name] for name in IMAGE_EXTENSIONS if name in files), None)
        if picture is None or "txt" not in files:
            raise DataError(f"it needs a picture ({', '.join(IMAGE_EXTENSIONS)}) and a .txt")
        texts = {
            name: _pread(shard, files[name], _MAX_TEXT) for name in ("txt", "json") if name in files
        }
        parse_caption(texts["txt"], max_bytes=_MAX_TEXT, allow_empty=True)
        encoded = _pread(shard, picture, MAX_IMAGE_BYTES)
        pixels = load_picture(encoded, settings.pixels, settings.image_range, max_pixels=max_pixels)
        return Sample(key, pixels, texts, "")
    except DataError as error:
        return Sample(key, None, texts, str(error))


def _pread(shard: int, place: Place, limit: int) -> bytes:
    offset, size = place
    if size > limit:
        raise DataError(f"a file of it has {size:,} bytes, more than {limit:,}")
    data = os.pread(shard, size, offset)
    if len(data) != size:
        raise DataError("the shard shrank while it was read")
    return data


def _read_encoder(path: Path, device: torch.device) -> Encoder:
    """`read_encoder` on a device."""
    if device.type == "cpu":
        return read_encoder(path)
    if path.suffix == ".onnx":
        raise DataError(f"{path}: an .onnx encoder runs on the CPU; add --num-gpus 0")
    autoencoder = read_autoencoder(path).to(device)
    return torch.no_grad()(lambda images: autoencoder.encode(images.to(device)))


def _begin(output: Path, settings: Settings) -> None:
    """Write the settings of a new conversion, or compare them with those that it was begun with."""
    path = output / RECORDS / "settings.json"
    if is_absent(path):
        for shard in output.glob("*.tar"):
            raise DataError(
                f"{shard}: is there and no record of its conversion is; write to another folder"
            )
        write_json(path, asdict(settings))
    begun = read_json(path)
    for name, value in asdict(settings).items():
        if not isinstance(begun, dict) or begun.get(name) != value:
            raise DataError(
                f"{path}: the conversion was begun with another {name}; go on with the same or "
                "write to another folder"
            )


def _state(source: Path) -> list[int]:
    state = source.stat()
    return [state.st_size, state.st_mtime_ns]


def _record_path(output: Path, source: Path) -> Path:
    return output / RECORDS / f"{source.stem}.json"


def read_record(output: Path, source: Path) -> dict[str, Any] | None:
    """The record of a raw shard that is converted; None where it is not, or has changed since."""
    record = read_json(_record_path(output, source))
    if record is None or misfit(record, _RECORD) or record["source"] != _state(source):
        return None
    target = output / source.name
    return record if target.is_file() and target.stat().st_size == record["bytes"] else None


def _finish(output: Path, sources: list[Path], faults: list[str]) -> Result:
    """Write the digests of all shards, and the list of what was left out; sum up the records."""
    records = {path: record for path in sources if (record := read_record(output, path))}
    left_out = [
        {"shard": path.name, **fault}
        for path, record in records.items()
        for fault in record["left_out"]
    ]
    with disk_errors(output, _MAKE_ROOM, DataError):
        write_digests(output, {output / path.name: r["sha256"] for path, r in records.items()})
        write_text(output / "left_out.jsonl", json_lines(left_out))
    samples = sum(record["samples"] for record in records.values())
    return Result(len(records), samples, len(left_out), faults)
