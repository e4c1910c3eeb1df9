"""On a CPU: our loader beside webdataset, our plain UNet beside diffusers', fast training steps
beside plain ones.

    python -m benchmarks.cpu_comparisons

Ratios are what counts: both sides run alternately on the same machine, on the same shards or
weights. Shards are written to a temporary folder and read from the page cache.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sd_perf.config import Config, DataConfig, UNetConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.shards import ShardWriter
from sd_perf.distributed.world import World
from sd_perf.models.build import build_unet, choose_ops
from sd_perf.models.key_maps import diffusers_unet_config, to_diffusers
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.presets import load_preset
from sd_perf.reference.unet import UNet
from sd_perf.training.step import TrainStep

REPEATS = 5
BATCH = 32
SAMPLES = 1024
STEPS = 10


def alternate(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each side, run in turns after one run of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write_moments(folder: Path) -> None:
    """The benchmark's layout and sizes: 64x64 moments in shards of 256."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=256) as writer:
        for sample in range(SAMPLES):
            writer.write(rng.standard_normal((8, 64, 64), dtype=np.float32), f"caption {sample}")


def compare_loaders() -> dict[str, float]:
    """Seconds for an epoch of shuffled batches; both give float32 moments (B, 8, 64, 64) and
    captions."""
    import webdataset

    with tempfile.TemporaryDirectory() as folder:
        write_moments(Path(folder))
        config = DataConfig(path=folder, workers=2)
        loader = PortableLoader(
            config, LoaderOptions(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH)
        )
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
    """Seconds of forward + backward at the smoke run's sizes, with the same weights and 32 groups
    in both."""
    define_missing_torchvision_ops()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = UNet(config)
    other = UNet2DConditionModel.from_config(diffusers_unet_config(config))
    other.load_state_dict(to_diffusers(unet.state_dict(), config))
    latents = torch.randn(BATCH, config.in_channels, latent_size, latent_size)
    context, timesteps = (
        torch.randn(BATCH, tokens, config.context_dim),
        torch.randint(0, 1000, (BATCH,)),
    )

    def ours() -> None:
        unet(latents, timesteps, context).square().mean().backward()

    def theirs() -> None:
        other(latents, timesteps, context).sample.square().mean().backward()

    return alternate({"plain UNet": ours, "diffusers UNet": theirs})


def compare_steps(smoke: Config) -> dict[str, float]:
    """Seconds of a training step of the smoke run, draws and optimizer included, with both
    networks."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    plain = replace(smoke, model=smoke.model.network)
    side, tokens = smoke.data.latent_size, smoke.data.context_tokens
    context = torch.randn(BATCH, tokens, smoke.model.context_dim)
    batch = Batch(torch.arange(BATCH), torch.randn(BATCH, 8, side, side), [""] * BATCH, context)

    def side_of(config: Config) -> Callable[[], None]:
        ops = choose_ops(config)
        unet = build_unet(config, seed=0, device=world.device, ops=ops)
        step = TrainStep(unet, config, seed=0, world=world, text_encoder=None, ops=ops)

        def steps() -> None:
            for _ in range(STEPS):
                step(iter([batch]), 0)

        return steps

    return alternate({"fast step": side_of(smoke), "plain step": side_of(plain)})


def main() -> None:
    smoke = load_preset(Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml")
    torch.set_num_threads(2)
    steps = compare_steps(smoke)
    torch.set_num_threads(1)
    sizes = {
        **vars(smoke.model.network),
        "resblock_groups": 32,
    }  # diffusers has one number of groups for all norms
    unets = compare_unets(UNetConfig(**sizes), smoke.data.latent_size, smoke.data.context_tokens)
    results = {
        "loader, seconds per 1,024 samples": compare_loaders(),
        "smoke's UNet, forward and backward, seconds per batch of 32": unets,
        f"smoke's training step on two threads, seconds per {STEPS}": steps,
    }
    for name, seconds in results.items():
        (ours, our_time), (theirs, their_time) = seconds.items()
        print(
            f"{name}: {ours} {our_time:.3f}, {theirs} {their_time:.3f}: ratio "
            f"{their_time / our_time:.2f}"
        )
    print(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
