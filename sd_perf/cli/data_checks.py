"""`sd-perf data verify` and `show`: whether data can be used, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.table import Table

from sd_perf.cli.console import print_json, print_plain, table_console
from sd_perf.cli.options import Settings, require_between
from sd_perf.cli.progress import progress
from sd_perf.errors import ConfigError, DataError
from sd_perf.visible import visible

if TYPE_CHECKING:
    from sd_perf.data.verify import Verdict

_ROWS = 40
"""shards that a table lists, at most; of more it lists those with faults"""
_MAX_SHOWN = 1000


def verify_data(
    settings: Settings,
    path: tyro.conf.Positional[Path | None] = None,
    config: Path | None = None,
    images: Path | None = None,
    captions: Path | None = None,
    record: bool = False,
    json: bool = False,
) -> int:
    """Read every sample of a folder of shards, or every picture of a folder of pictures; exits 1
    where one cannot be used, and names it.

    Where files beside the shards tell how many samples a shard has (of `data convert`, of
    img2dataset), they are counted; where a SHA256SUMS is there, bytes are compared with it. With a
    preset samples must be as its run needs them; without, as the first one is, and captions may be
    empty.

    Args:
        path: folder of shards or pictures (default: data.path of the preset)
        config: YAML preset of the run that trains on the shards
        settings: fields of the preset
        images: folder of images with a captions.jsonl, or of raw shards, as `data prepare` would
            read them
        captions: captions.jsonl with `file` and `captions` (default: in the images' folder or its
            parent)
        record: write SHA256SUMS, where all can be used, in place of comparing with it
        json: print the verdict as JSON
    """
    from sd_perf.data.digests import SUMS_NAME, compare_digests, record_digests

    folder = images or path or Path(settings.data.path)
    verdicts = _verdicts(settings, path, config, images, captions, record)
    files = [file for verdict in verdicts for file in verdict.files]
    digests = {file: sha for verdict in verdicts for file, sha in verdict.digests.items()}
    other = [] if record else list(compare_digests(folder, files, digests))
    faults = [fault for verdict in verdicts for fault in verdict.faults] + other
    if record and not faults:
        record_digests(folder, files)
    if json:
        print_json(_as_json(folder, verdicts, faults))
    else:
        for fault in faults:
            print_plain(fault)
        table_console().print(_table(verdicts, other))
        if record and not faults:
            print_plain(f"digests of {len(files)} files -> {folder / SUMS_NAME}")
    return 1 if faults else 0


def _verdicts(
    settings: Settings,
    path: Path | None,
    config: Path | None,
    images: Path | None,
    captions: Path | None,
    record: bool,
) -> list[Verdict]:
    """What was found in each shard, or in a folder of pictures."""
    from sd_perf.data.digests import SUMS_NAME
    from sd_perf.data.shards import find_shards
    from sd_perf.data.verify import find_format, fitted, verify_pictures, verify_shards

    folder = images or path or Path(settings.data.path)
    if folder == Path():
        raise ConfigError("data verify needs a folder, or a preset (--config) with data.path")
    require_folder(folder)
    format: str = settings.data.format
    if path or format == "synthetic":
        format = find_format(folder)
    if images or not format:
        with progress("pictures") as report:
            found = list(verify_pictures(folder, settings, captions))
            report(1, 1)
        return found
    with progress("shards") as report:
        verdicts, total = [], len(find_shards(folder, format))
        with_digests = record or (folder / SUMS_NAME).exists()
        fitting = settings if config else fitted(folder, format, settings)
        for verdict in verify_shards(folder, format, fitting, with_digests=with_digests):
            verdicts.append(verdict)
            report(len(verdicts), total)
    return verdicts


def _table(verdicts: list[Verdict], digest_faults: list[str]) -> Table:
    table = Table("", "samples", "empty captions", "faults")
    sums = [0, 0, 0]
    for verdict in verdicts:
        of_digests = sum(fault.startswith(f"{verdict.path}") for fault in digest_faults)
        counts = verdict.samples, verdict.empty_captions, len(verdict.faults) + of_digests
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        if len(verdicts) <= _ROWS or counts[-1]:
            table.add_row(visible(verdict.path.name), *(f"{count:,}" for count in counts))
    table.add_section()
    sums[-1] = sum(len(verdict.faults) for verdict in verdicts) + len(digest_faults)
    table.add_row(f"all {len(verdicts):,}", *(f"{total:,}" for total in sums))
    return table


def _as_json(folder: Path, verdicts: list[Verdict], faults: list[str]) -> dict[str, object]:
    return {
        "path": str(folder),
        "samples": sum(verdict.samples for verdict in verdicts),
        "empty_captions": sum(verdict.empty_captions for verdict in verdicts),
        "faults": faults,
        "parts": [
            {
                "path": str(verdict.path),
                "samples": verdict.samples,
                "empty_captions": verdict.empty_captions,
                "faults": verdict.faults,
                "sha256": {file.name: sha for file, sha in verdict.digests.items()},
            }
            for verdict in verdicts
        ],
    }


def show(
    settings: Settings,
    path: tyro.conf.Positional[Path],
    config: Path | None = None,
    n: int = 16,
    autoencoder: Path | None = None,
    output: Path = Path("contact_sheet.html"),
) -> int:
    """Put samples of a folder of shards or pictures on an HTML page, with their captions.

    Moments are decoded where an autoencoder is given, else shown in false colours. Which range of
    pixels they were made of is taken from the record of `data convert`, or data.image_range.

    Args:
        path: folder of shards or pictures
        config: YAML preset of the run that trains on them
        settings: fields of the preset
        n: samples to show, evenly spread over the folder
        autoencoder: file that holds the decoder: .onnx, or .ckpt or .safetensors in LDM names
        output: the page
    """
    from sd_perf.data.show import examples
    from sd_perf.models.readers import read_decoder
    from sd_perf.tools.contact_sheet import write_contact_sheet

    require_between("--n", n, 1, _MAX_SHOWN)
    require_folder(path)
    decoder = read_decoder(autoencoder) if autoencoder else None
    found = examples(path, settings, n, decoder, has_preset=config is not None)
    count = write_contact_sheet(found, path, output)
    print_plain(f"{count} samples -> {output}")
    return 0


def require_folder(path: Path) -> None:
    """DataError where the path is no folder."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; name the folder of shards or pictures")
