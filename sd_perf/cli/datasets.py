"""`sd-perf data` on the benchmark's data sets: what the scripts in scripts/datasets call.

Options are named as in the benchmark's own scripts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from sd_perf.cli.console import print_plain, table_console
from sd_perf.cli.options import MAX_BATCH, MAX_SAMPLES, require_between
from sd_perf.cli.progress import progress
from sd_perf.visible import visible

_MAX_WORKERS = 1024
_LICENCES = 30
"""licences in a table, at most; LAION-400M has about ten"""


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
