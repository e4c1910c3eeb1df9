"""`sd-perf data prepare`, `encode`, `bench`, `scenes` and `statistics`: what training and scores
read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import (
    MAX_BATCH,
    MAX_SAMPLES,
    GPUName,
    Settings,
    require_between,
    require_option,
    require_seed,
)
from sd_perf.cli.place import LOCAL_RANK, PLACE
from sd_perf.cli.progress import progress
from sd_perf.config import Config
from sd_perf.distributed.launcher import MAX_RANKS
from sd_perf.errors import ConfigError

if TYPE_CHECKING:
    from sd_perf.data.prepare.prepare_shards import Survey

_FAULTS = 20
"""pictures that cannot be used and are named by a dry run, at most"""


def prepare(
    config: Path,
    settings: Settings,
    images: Path,
    autoencoder: Path | None = None,
    captions: Path | None = None,
    caption_column: str = "",
    crop: Literal["center", "random", "none"] = "center",
    small: Literal["refuse", "enlarge"] = "refuse",
    background: str = "white",
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
    dry_run: bool = False,
) -> int:
    """Make moments shards (and text states, where data.context is precomputed) from a folder of
    captioned images.

    The shards go to data.path, with a contact_sheet.html of what training will see; the images are
    resized to 8 x data.latent_size pixels. Of equal files the first is taken.

    Args:
        config: YAML preset of the run that will train on the shards
        settings: fields of the preset
        images: folder of images, nested or not, with a table of captions (captions.jsonl,
            metadata.jsonl, .csv, .tsv) or a .txt beside each, or of raw shards (*.tar)
        autoencoder: file that holds the encoder: .onnx, or .ckpt or .safetensors in LDM names
            (default: data.autoencoder)
        captions: table of file names and captions (.jsonl, .csv, .tsv; default: found in the
            images' folder, or captions.jsonl beside it), or folder of .txt files
        caption_column: the table's column of captions (default: captions, caption, text or prompt)
        crop: the square taken of each image: its middle, a random one, or none, which refuses
            images that are not square
        small: refuse or enlarge images with a side below the square's
        background: colour under transparent images, a name or #rrggbb
        captions_per_image: samples made of each image, one per caption
        samples_per_shard: samples per tar file
        dry_run: read and count, write nothing; exits 1 where the images would be refused
    """
    from sd_perf.data.prepare.prepare_shards import prepare_shards, survey_images
    from sd_perf.tools.contact_sheet import write_contact_sheet

    require_between("--captions-per-image", captions_per_image, 1, MAX_SAMPLES)
    fits = 1 <= samples_per_shard <= 10_000
    require_option("--samples-per-shard", samples_per_shard, fits, "1 to 10000")
    survey = survey_images(
        settings, images, captions, caption_column, crop=crop, small=small, background=background
    )
    if dry_run:
        return _count(survey, settings)
    encoder = _autoencoder(autoencoder, settings)
    with progress("pictures") as report:
        numbers = captions_per_image, samples_per_shard
        count = prepare_shards(settings, survey, encoder, *numbers, progress=report)
    sheet, side = Path(settings.data.path) / "contact_sheet.html", survey.framing.size
    write_contact_sheet(survey.examples, images, sheet)
    print_plain(*survey.lines(), f"what training will see -> {sheet}")
    print_plain(f"{count} samples of {side}x{side} pixels -> {settings.data.path}")
    return 0


def _autoencoder(named: Path | None, settings: Config) -> Path:
    """The file of the encoder, from the option or the preset."""
    if named is None and not settings.data.autoencoder:
        raise ConfigError(
            "--autoencoder names no file, and neither does data.autoencoder; name the file of an "
            "encoder, or count the pictures by --dry-run"
        )
    return named or Path(settings.data.autoencoder)


def _count(survey: Survey, settings: Config) -> int:
    """Read the pictures and print what is found; 1 where `data prepare` would refuse them."""
    with progress("pictures") as report:
        for _ in survey.pictures(settings.data.workers, report):
            pass
    print_plain(*survey.lines())
    for fault in survey.bad[:_FAULTS]:
        print_plain(f"cannot be used: {fault}")
    limit, bad = settings.data.max_bad_samples, len(survey.bad)
    if refused := bad > limit:
        print_plain(
            f"data prepare would refuse the folder: {bad:,} pictures cannot be used, more than "
            f"data.max_bad_samples ({limit:,})"
        )
    return int(refused)


def encode(
    config: Path,
    settings: Settings,
    source: Path,
    source_format: Literal["raw", "moments"],
    text: Literal["encode", "copy"] = "encode",
    batch_size: int = 8,
) -> int:
    """Make encoded shards of raw or moments shards: what the frozen networks give, in 16 bits.

    The shards go to data.path, one for each of the source. Run again, it goes on with those that
    are missing. Under torchrun or srun each process takes its share of them.

    Args:
        config: YAML preset of the run that will train on the shards (data.format encoded)
        settings: fields of the preset; data.autoencoder is the file of the encoder, for raw shards
        source: folder of the shards to encode
        source_format: their format, as data.format names it
        text: text states, where data.context is precomputed: encode captions, or copy the source's
        batch_size: pictures per call of the encoder
    """
    from sd_perf.data.prepare.encode import ShardEncoder
    from sd_perf.distributed.world import choose_device

    require_between("--batch-size", batch_size, 1, MAX_BATCH)
    device = choose_device(settings.training.device, LOCAL_RANK)
    encoder = ShardEncoder(
        settings,
        source,
        source_format,
        copy_text=text == "copy",
        device=device,
        batch_size=batch_size,
    )
    encoder.run(PLACE.rank, PLACE.size)
    total, missing = encoder.total, encoder.missing()
    part = f"process {PLACE.rank + 1} of {PLACE.size}: " if PLACE.size > 1 else ""
    print_plain(
        f"{part}{total.samples} samples, {total.bad} of them bad -> {settings.data.path}",
        f"rounding to float16: moments {total.moments}; text states {total.context}",
    )
    if missing:
        print_plain(f"{missing} of {len(encoder.paths)} shards are still to be encoded")
    return 0


def bench(
    config: Path,
    settings: Settings,
    seconds: float = 10.0,
    ranks: int = 1,
    gpu: GPUName | None = None,
    step_rate: float | None = None,
) -> int:
    """Measure the loader of a config alone: samples per second, what a sample costs and where, and
    whether the step of a GPU would wait for it.

    Args:
        config: YAML preset of the run
        settings: fields of the preset
        seconds: to read for
        ranks: processes that share the batch; one of them is measured, alone on this machine
        gpu: a GPU whose least time of the config's step is taken for the step's
        step_rate: samples per second that a step takes of each process, in its place
    """
    from sd_perf.tools.estimate.predict import predict
    from sd_perf.tools.loader_rate import measure

    require_between("--ranks", ranks, 1, MAX_RANKS)
    require_option("--seconds", seconds, 0 < seconds <= 3600, "above 0, at most 3600")
    ok = step_rate is None or (gpu is None and 0 < step_rate < 1e9)
    require_option("--step-rate", step_rate, ok, "above 0, and not beside --gpu")
    needed, who = step_rate, "it"
    if gpu is not None:
        facts = predict(settings, gpu, batch=settings.micro_batch_size(ranks), ranks=ranks)
        needed, who = facts["installed"]["samples_per_second"], f"{gpu} at its least time"
    print_plain(*measure(settings, ranks, seconds).lines(needed, who))
    return 0


def scenes(
    output: Path,
    samples: int = 4096,
    seed: int = 1,
    uncaptioned_every: int = 0,
    shards: bool = False,
) -> int:
    """Draw captioned 64x64 pictures of two coloured shapes: the tiny world, which trains in minutes
    on a CPU.

    Args:
        output: new folder
        samples: how many pictures
        seed: of the pictures
        uncaptioned_every: each n-th picture gets the empty caption, which guidance needs; 0: none
            does
        shards: raw shards (tar files of images and captions) instead of PNG files with a
            captions.jsonl
    """
    from sd_perf.data.prepare.scenes import write_scene_shards, write_scenes

    require_between("--samples", samples, 1, MAX_SAMPLES)
    require_seed("--seed", seed)
    require_between("--uncaptioned-every", uncaptioned_every, 0, MAX_SAMPLES)
    write = write_scene_shards if shards else write_scenes
    write(output, samples, seed, uncaptioned_every)
    print_plain(f"{samples} scenes -> {output}")
    return 0


def statistics(config: Path, settings: Settings, images: Path) -> int:
    """Write the statistics that FID compares with (evaluation.statistics) from a folder of
    captioned images.

    Args:
        config: YAML preset of the run
        settings: fields of the preset
        images: folder of images with a captions.jsonl, or of raw shards (*.tar of .jpg, .txt,
            .json)
    """
    from sd_perf.evaluation.evaluate import write_statistics

    count = write_statistics(images, settings)
    print_plain(f"statistics of {count} images -> {settings.evaluation.statistics}")
    return 0
