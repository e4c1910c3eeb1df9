"""Three pairs on a CPU: loader and webdataset, plain UNet and diffusers', fast and plain step.

    python -m benchmarks.cpu_comparisons [--output FILE.json]

Ratios are what counts: the two sides of a pair run in turns on the same machine, on the same shards
or weights. Shards are written to a temporary folder and read from the page cache. The networks have
the sizes of configs/smoke.yaml. Needs webdataset and diffusers.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from benchmarks.command import command_parser
from sd_perf.config import Config, DataConfig, UNetConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.distributed.world import World
from sd_perf.models.build import build_unet, choose_ops
from sd_perf.models.key_maps import diffusers_unet_config, to_diffusers
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.presets import load_preset
from sd_perf.reference.unet import UNet
from sd_perf.tools.results import REPOSITORY, Provenance, Result, write
from sd_perf.training.build_step import build_step

REPEATS = 5
BATCH = 32
SAMPLES = 1024
STEPS = 10


class ComparisonRow(TypedDict):
    """Two sides that do the same work."""

    work: str
    """what is timed"""
    threads: int
    first: str
    second: str
    first_s: float
    """median seconds"""
    second_s: float
    ratio: float
    """`second_s` over `first_s`"""


def alternate(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each side: `REPEATS` runs in turns, after one of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write_moments(folder: Path) -> None:
    """Write random moments (8, 64, 64) and captions in the benchmark's layout, 256 a shard."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=256) as writer:
        for sample in range(SAMPLES):
            writer.write(rng.standard_normal((8, 64, 64), dtype=np.float32), f"caption {sample}")


def compare_loaders() -> dict[str, float]:
    """Seconds of an epoch of shuffled batches: float32 moments (B, 8, 64, 64) and captions."""
    import webdataset

    with tempfile.TemporaryDirectory() as folder:
        write_moments(Path(folder))
        options = LoaderOptions(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH)
        loader = PortableLoader(DataConfig(path=folder, workers=2), options)
        shards = sorted(str(path) for path in Path(folder).glob("*.tar"))

        def ours() -> None:
            batches = loader.batches(0)
            assert sum(len(next(batches).captions) for _ in range(SAMPLES // BATCH)) == SAMPLES
            batches.close()  # type: ignore[attr-defined]

        def theirs() -> None:
            dataset = webdataset.WebDataset(shards, shardshuffle=4, seed=0).shuffle(1000).decode()
            batches = dataset.to_tuple("npy", "txt").batched(BATCH)
            assert sum(len(torch.from_numpy(np.stack(npy))[:, 0]) for npy, _ in batches) == SAMPLES

        return alternate({"portable loader": ours, "webdataset": theirs})


def compare_unets(config: UNetConfig, latent_size: int, tokens: int) -> dict[str, float]:
    """Seconds of forward and backward of a batch, with the same weights in both networks."""
    define_missing_torchvision_ops()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = UNet(config)
    other = UNet2DConditionModel.from_config(diffusers_unet_config(config))
    other.load_state_dict(to_diffusers(unet.state_dict(), config))
    latents = torch.randn(BATCH, config.in_channels, latent_size, latent_size)
    context = torch.randn(BATCH, tokens, config.context_dim)
    timesteps = torch.randint(0, 1000, (BATCH,))

    def ours() -> None:
        unet(latents, timesteps, context).square().mean().backward()

    def theirs() -> None:
        other(latents, timesteps, context).sample.square().mean().backward()

    return alternate({"plain UNet": ours, "diffusers UNet": theirs})


def compare_steps(smoke: Config) -> dict[str, float]:
    """Seconds of `STEPS` training steps of the smoke run, draws and optimizer included."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    plain = replace(smoke, model=smoke.model.network)
    side, tokens = smoke.data.latent_size, smoke.data.context_tokens
    context = torch.randn(BATCH, tokens, smoke.model.context_dim)
    batch = Batch(torch.arange(BATCH), torch.randn(BATCH, 8, side, side), [""] * BATCH, context)

    def side_of(config: Config) -> Callable[[], None]:
        ops = choose_ops(config)
        unet = build_unet(config, seed=0, device=world.device, ops=ops)
        step = build_step(unet, config, seed=0, world=world, text_encoder=None, ops=ops)

        def steps() -> None:
            for _ in range(STEPS):
                step(iter([batch]), 0)

        return steps

    return alternate({"fast step": side_of(smoke), "plain step": side_of(plain)})


def make_row(work: str, threads: int, seconds: dict[str, float]) -> ComparisonRow:
    """A row of a pair's median seconds."""
    (first, first_s), (second, second_s) = seconds.items()
    return {
        "work": work,
        "threads": threads,
        "first": first,
        "second": second,
        "first_s": first_s,
        "second_s": second_s,
        "ratio": second_s / first_s,
    }


def measure() -> list[ComparisonRow]:
    """The three pairs."""
    smoke = load_preset(REPOSITORY / "configs/smoke.yaml")
    torch.set_num_threads(2)
    steps = compare_steps(smoke)
    torch.set_num_threads(1)
    # diffusers has one number of groups for all norms.
    network = UNetConfig(**{**vars(smoke.model.network), "resblock_groups": 32})
    unets = compare_unets(network, smoke.data.latent_size, smoke.data.context_tokens)
    loaders = compare_loaders()
    return [
        make_row(f"loader, {SAMPLES:,} samples", threads=1, seconds=loaders),
        make_row(f"smoke's UNet, forward and backward, batch of {BATCH}", threads=1, seconds=unets),
        make_row(f"smoke's training step, {STEPS} steps", threads=2, seconds=steps),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    parser = command_parser("cpu_comparisons", __doc__)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    rows = measure()
    for row in rows:
        first, second = f"{row['first']} {row['first_s']:.3f} s", f"{row['second_s']:.3f} s"
        print(
            f"{row['work']}, threads: {row['threads']}: {first}, {row['second']} {second}: "
            f"ratio {row['ratio']:.2f}"
        )
    if options.output:
        machine = {"platform": platform.platform()}
        versions = {"torch": torch.__version__}
        provenance = Provenance.of_this_run("cpu_comparisons", machine, versions)
        write(options.output, Result("cpu_comparisons", provenance, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
