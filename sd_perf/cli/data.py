"""`sd-perf data prepare`, `verify`, `scenes` and `statistics`: what training and scores read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import (
    MAX_SAMPLES,
    Settings,
    require_between,
    require_option,
    require_seed,
)


def prepare(
    config: Path,
    settings: Settings,
    images: Path,
    autoencoder: Path,
    captions: Path | None = None,
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
    pixel_range: Literal["minus_one_one", "zero_one"] = "minus_one_one",
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
        pixel_range: range of the pixels that the encoder gets; autoencoders are trained on [-1, 1],
            and the benchmark's own shards were made from [0, 1]
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
        pixel_range=pixel_range,
    )
    print_plain(f"{count} samples of {pixels}x{pixels} pixels -> {settings.data.path}")
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
