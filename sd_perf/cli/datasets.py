"""`sd-perf data` on the benchmark's data sets: what the scripts in scripts/datasets call.

Options are named as in the benchmark's own scripts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from sd_perf.cli.console import print_plain, table_console
from sd_perf.cli.options import MAX_BATCH, MAX_SAMPLES, Settings, require_between, require_option
from sd_perf.cli.progress import progress
from sd_perf.visible import visible

_MAX_WORKERS = 1024
_MOST_PIXELS = 300_000_000
"""of --max-pixels; Pillow itself refuses images of 357 million"""
_LICENCES = 30
"""licences in a table, at most; LAION-400M has about ten"""
_ERRORS = 20
"""kinds of errors in a table, at most"""


def split_coco(
    input_images_path: Annotated[Path, tyro.conf.arg(aliases=("-i",))],
    input_coco_captions: Annotated[Path, tyro.conf.arg(aliases=("-c",))],
    output_images_path: Annotated[Path, tyro.conf.arg(aliases=("-o",))],
    output_tsv_file: Annotated[Path, tyro.conf.arg(aliases=("-t",))],
    num_samples: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 30_000,
    size: int = 512,
    workers: Annotated[int, tyro.conf.arg(aliases=("-j",))] = 8,
) -> int:
    """Make the benchmark's validation set of COCO 2014: 30,000 pictures, resized, and a caption of
    each.

    Pictures that are there already are kept, so a run that was stopped goes on.

    Args:
        input_images_path: folder of COCO's val2014 pictures
        input_coco_captions: captions_val2014.json of COCO's annotations
        output_images_path: folder for the resized pictures
        output_tsv_file: table of the captions: image_id, id, caption
        num_samples: pictures to take
        size: rows and columns of the resized pictures, pixels
        workers: threads that resize
    """
    from sd_perf.data.coco import split_and_resize

    require_between("--num-samples", num_samples, 1, MAX_SAMPLES)
    require_between("--size", size, 1, 8192)
    require_between("--workers", workers, 1, _MAX_WORKERS)
    with progress("pictures") as report:
        split_and_resize(
            input_images_path,
            input_coco_captions,
            output_images_path,
            output_tsv_file,
            num_samples=num_samples,
            size=size,
            threads=workers,
            progress=report,
        )
    print_plain(f"{num_samples:,} pictures of {size}x{size} pixels -> {output_images_path}")
    print_plain(f"their captions -> {output_tsv_file}")
    return 0


def filter_metadata(
    input_metadata_dir: Annotated[Path, tyro.conf.arg(aliases=("-i",))],
    output_metadata_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))],
) -> int:
    """Keep the rows of LAION-400M's metadata whose picture has a known licence, as the benchmark
    does (LICENSE is not "?").

    Files that are there already are kept, so a run that was stopped goes on.

    Args:
        input_metadata_dir: folder of LAION-400M's *.parquet files
        output_metadata_dir: folder for the filtered files, which have the same names
    """
    from sd_perf.data.laion import metadata

    with progress("files") as report:
        counts = metadata.filter_metadata(input_metadata_dir, output_metadata_dir, report)
    total = sum(counts.values(), Counter())
    table = Table("licence", "rows", "")
    for licence, rows in total.most_common(_LICENCES):
        fate = "dropped" if licence == metadata.UNKNOWN else "kept"
        table.add_row(visible(licence[:100]), f"{rows:,}", fate)
    table_console().print(table)
    kept = total.total() - total[metadata.UNKNOWN]
    print_plain(f"{kept:,} of {total.total():,} rows -> {output_metadata_dir}")
    return 0


def fid_statistics(
    dataset_dir: Annotated[Path, tyro.conf.arg(aliases=("-d",))],
    output_file: Annotated[Path, tyro.conf.arg(aliases=("-o",))],
    features: Path,
    batch_size: int = 50,
    workers: Annotated[int, tyro.conf.arg(aliases=("-j",))] = 8,
) -> int:
    """Write the statistics that FID compares with, of a folder of pictures as they are: those of
    pytorch-fid.

    A call that was stopped goes on where it is repeated. `data statistics` resizes the pictures of
    a run first.

    Args:
        dataset_dir: folder of the pictures
        output_file: .npz file for their mean and covariance (mu, sigma)
        features: weights of FID's Inception (pt_inception-2015-12-05-6726825d.pth)
        batch_size: pictures per call of the network
        workers: threads that decode
    """
    import torch

    from sd_perf.evaluation.folder_statistics import write_folder_statistics

    require_between("--batch-size", batch_size, 1, MAX_BATCH)
    require_between("--workers", workers, 1, _MAX_WORKERS)
    with progress("pictures") as report:
        count = write_folder_statistics(
            dataset_dir,
            output_file,
            features,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=batch_size,
            threads=workers,
            progress=report,
        )
    print_plain(f"statistics of {count:,} pictures -> {output_file}")
    return 0


def download_images(
    metadata_dir: Annotated[Path, tyro.conf.arg(aliases=("-m",))],
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))],
    processes: Annotated[int, tyro.conf.arg(aliases=("-j",))] = 16,
    threads: Annotated[int, tyro.conf.arg(aliases=("-t",))] = 64,
    environment: Path | None = None,
) -> int:
    """Fetch the pictures of LAION's metadata into raw shards, by img2dataset.

    It is installed into an environment of its own first. Shards that are complete are kept, so a
    run that was stopped goes on. What became of each picture is in download_status.parquet. Exits 1
    where img2dataset gave shards up.

    Args:
        metadata_dir: folder of the filtered *.parquet files
        output_dir: folder for the raw shards (*.tar of .jpg, .txt, .json)
        processes: processes of img2dataset
        threads: threads of each process, which fetch
        environment: folder of img2dataset's environment (default: in ~/.cache/sd-perf)
    """
    from sd_perf.data.laion import download

    require_between("--processes", processes, 1, _MAX_WORKERS)
    require_between("--threads", threads, 1, _MAX_WORKERS)
    folder = environment or download.default_environment()
    program = download.make_environment(folder, print_plain)
    result = download.download(
        metadata_dir, output_dir, program, processes=processes, threads=threads
    )
    table = Table("status", "error", "pictures")
    for (status, error), count in result.statuses.most_common(_ERRORS):
        table.add_row(visible(status), visible(error), f"{count:,}")
    table_console().print(table)
    good = sum(count for (status, _), count in result.statuses.items() if status == "success")
    print_plain(f"{good:,} of {result.rows:,} pictures -> {output_dir}")
    if result.tried < result.rows:
        print_plain(f"{result.rows - result.tried:,} were not tried; run the command again")
    return 1 if result.tried < result.rows else 0


def convert(
    config: Path,
    settings: Settings,
    input_folder: Annotated[Path, tyro.conf.arg(aliases=("-i",))],
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o", "--output-folder"))],
    checkpoint: Path,
    image_range: Literal["benchmark", "correct"] = "benchmark",
    num_gpus: Annotated[int | None, tyro.conf.arg(aliases=("-g",))] = None,
    processes: int = 1,
    batch_size: int = 8,
    workers: Annotated[int, tyro.conf.arg(aliases=("-j",))] = 4,
    max_pixels: int = 50_000_000,
) -> int:
    """Encode raw shards (*.tar of .jpg, .txt, .json) into shards of moments of the same names.

    Shards that are there already are kept, so a run that was stopped goes on. Pictures that cannot
    be decoded are left out and listed in left_out.jsonl. Exits 1 where a shard cannot be read.

    Args:
        config: YAML preset of the run that will train on the shards; pictures are resized to 8 x
            data.latent_size pixels
        settings: fields of the preset
        input_folder: folder of the raw shards
        output_dir: folder for the shards of moments
        checkpoint: file that holds the encoder: 512-base-ema.ckpt, or .onnx, or .safetensors in LDM
            names
        image_range: range of the pixels that the encoder gets: [0, 1], as the benchmark's were made
            (benchmark), or [-1, 1], which autoencoders are trained on (correct)
        num_gpus: GPUs, with a process each (default: all of this machine); 0 encodes on the CPU
        processes: processes where there is no GPU
        batch_size: pictures per call of the encoder
        workers: threads of a process that decode
        max_pixels: of the largest picture that is decoded; larger ones are left out
    """
    from sd_perf.data.laion.convert import convert
    from sd_perf.models.vae import PIXELS_PER_LATENT

    require_between("--batch-size", batch_size, 1, MAX_BATCH)
    require_between("--workers", workers, 1, _MAX_WORKERS)
    require_between("--max-pixels", max_pixels, 1, _MOST_PIXELS)
    with progress("shards") as report:
        result = convert(
            input_folder,
            output_dir,
            checkpoint,
            pixels=PIXELS_PER_LATENT * settings.data.latent_size,
            image_range=image_range,
            devices=_devices(num_gpus, processes),
            batch_size=batch_size,
            threads=workers,
            max_pixels=max_pixels,
            progress=report,
        )
    print_plain(
        *result.faults,
        f"{result.samples:,} samples in {result.shards:,} shards, {result.left_out:,} pictures "
        f"left out -> {output_dir}",
    )
    return 1 if result.faults else 0


def _devices(num_gpus: int | None, processes: int) -> list[str]:
    """A device for each process of a conversion: so many GPUs (None: all), or the CPU."""
    import torch

    have = torch.cuda.device_count()
    gpus = have if num_gpus is None else num_gpus
    require_option("--num-gpus", gpus, 0 <= gpus <= have, f"0 to {have}, the GPUs that are here")
    require_between("--processes", processes, 1, _MAX_WORKERS)
    return [f"cuda:{number}" for number in range(gpus)] or ["cpu"] * processes
