"""`sd-perf data prepare`, `encode`, `bench`, `scenes` and `statistics`: what training and scores
read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sd_perf.cli.console import LOCAL_RANK, PLACE, print_plain
from sd_perf.cli.options import (
    MAX_BATCH,
    MAX_SAMPLES,
    GPUName,
    Settings,
    require_between,
    require_option,
    require_seed,
)
from sd_perf.distributed.launcher import MAX_RANKS


def prepare(
    config: Path,
    settings: Settings,
    images: Path,
    autoencoder: Path,
    captions: Path | None = None,
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
) -> int:
    """Make moments shards (and text states, where data.context is precomputed) from a folder of
    captioned images.

    The shards go to data.path; the images are resized to 8 x data.latent_size pixels.

    Args:
        config: YAML preset of the run that will train on the shards
        settings: fields of the preset
        images: folder of images with a captions.jsonl, or of raw shards (*.tar of .jpg, .txt,
            .json)
        autoencoder: file that holds the encoder: .onnx, or .ckpt or .safetensors in LDM names
        captions: captions.jsonl with `file` and `captions` (default: in the images' folder or its
            parent)
        captions_per_image: samples made of each image, one per caption
        samples_per_shard: samples per tar file
    """
    from sd_perf.data.prepare.prepare_shards import prepare_shards

    require_between("--captions-per-image", captions_per_image, 1, MAX_SAMPLES)
    fits = 1 <= samples_per_shard <= 10_000
    require_option("--samples-per-shard", samples_per_shard, fits, "1 to 10000")
    count, pixels = prepare_shards(
        settings,
        images,
        autoencoder,
        captions=captions,
        captions_per_image=captions_per_image,
        samples_per_shard=samples_per_shard,
    )
    print_plain(f"{count} samples of {pixels}x{pixels} pixels -> {settings.data.path}")
    return 0


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
