"""The benchmark's networks at full size, once, on a CPU: time and memory of every stage.

    python -m benchmarks.full_size_cpu --images DIR --output DIR

Encodes photographs into a moments shard, takes an optimizer step on a random sample and one on the
photographs, draws latents by DDIM and decodes them into pictures.

The images' DIR holds photographs and, in it or beside it, their captions.jsonl. Weights and text
states are random and seeded: the run shows that the full size works and what it costs; its pictures
show nothing. Prints a table; writes full_size_cpu.json, the moments shard and the pictures.

Shape letters: B samples, C latent channels, S latent rows and columns, L text tokens, D context
channels.
"""

from __future__ import annotations

import gc
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import command_parser
from benchmarks.gpu_workload import make_inputs, randomize
from sd_perf.config import Config, DataConfig, DiffusionConfig, UNetConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.images import load_image
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.diffusion.ddim import ddim_sample
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.errors import DataError, UserError
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.reference.step import DiffusionStep
from sd_perf.reference.unet import UNet
from sd_perf.tools.results import Conditions, Provenance, Result, write
from sd_perf.training.optimizer import build_optimizer

SEED = 0
PHOTOGRAPHS = 2
DDIM_STEPS = 2
CACHED = "what earlier stages made: weights, text states, latents"
NOTE = (
    "Weights of both networks and the text states are random, seeded; the pictures show nothing "
    "but that."
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything; the defaults are the benchmark's."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """the denoiser"""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """the autoencoder"""
    image: int = 512
    """height and width of the photographs, pixels"""
    context_tokens: int = 77
    """text tokens per caption"""

    @property
    def latent(self) -> int:
        """Height and width of the latents."""
        return self.image // self.autoencoder.downsampling


class StageRow(Conditions):
    """One stage of the run."""

    stage: str
    seconds: float
    peak_memory_bytes: int
    """peak of the process's resident memory"""
    peak_of_stage_alone: bool
    """false: Linux did not let the peak be reset, so it may be an earlier stage's"""


class Stages:
    """Measures stages one after the other; `rows` has one entry each."""

    def __init__(self) -> None:
        self.rows: list[StageRow] = []

    @contextmanager
    def __call__(self, name: str, batch: int | None = 1) -> Iterator[None]:
        """Measure the block, which takes `batch` samples, and print its row."""
        gc.collect()
        alone = _reset_peak_memory()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.rows.append(
            {
                "batch": batch,
                "dtype": "float32",
                "cached": CACHED,
                "stage": name,
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "peak_of_stage_alone": alone,
            }
        )
        print(f"{seconds:9.2f} s  {peak / 2**30:6.2f} GiB  {name}", flush=True)


def _reset_peak_memory() -> bool:
    try:
        # proc(5): 5 sets the peak to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@torch.no_grad()
def encode_photographs(images_dir: Path, shards: Path, sizes: Sizes, stages: Stages) -> None:
    """Encode photographs into a shard of moments (2C, S, S) and random text states (L, D).

    DataError where there are fewer than `PHOTOGRAPHS` with captions.
    """
    samples = read_images(images_dir)[:PHOTOGRAPHS]
    if len(samples) < PHOTOGRAPHS:
        raise DataError(
            f"{images_dir} has {len(samples)} captioned photographs; {PHOTOGRAPHS} are needed"
        )
    with stages("autoencoder: build", batch=None):
        autoencoder = _autoencoder(sizes)
    moments = []
    for number, sample in enumerate(samples, 1):
        with stages(f"photograph {number}: decode, resize, autoencoder encode"):
            image = load_image(sample.path, sizes.image) * 2 - 1
            moments.append(autoencoder.encode(image[None])[0].numpy())
    contexts = _text_states(sizes, range(PHOTOGRAPHS)).half().numpy()
    with stages("moments shard: write", batch=PHOTOGRAPHS), ShardWriter(shards) as writer:
        for values, sample, context in zip(moments, samples, contexts, strict=True):
            writer.write(values, sample.captions[0], sample.metadata, context)


def _autoencoder(sizes: Sizes) -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(sizes.autoencoder).requires_grad_(False).eval()


def _text_states(sizes: Sizes, samples: range) -> torch.Tensor:
    """Standard normal text states (B, L, D) float32, one for each sample number.

    Numbers past the photographs' stand for other prompts.
    """
    indices = torch.tensor(list(samples))
    numbers = normal(SEED, Stream.SYNTHETIC, indices, sizes.context_tokens * sizes.unet.context_dim)
    return numbers.view(len(indices), sizes.context_tokens, sizes.unet.context_dim)


def load_batches(shards: Path, sizes: Sizes, stages: Stages) -> list[Batch]:
    """The shard's samples as micro-batches of one, through the trainer's portable loader."""
    config = DataConfig(
        path=str(shards),
        latent_size=sizes.latent,
        context="precomputed",
        context_tokens=sizes.context_tokens,
    )
    with stages("moments shard: index and load", batch=PHOTOGRAPHS):
        options = LoaderOptions(
            seed=SEED,
            global_batch_size=PHOTOGRAPHS,
            micro_batch_size=1,
            in_channels=sizes.unet.in_channels,
            context_dim=sizes.unet.context_dim,
        )
        batches = PortableLoader(config, options).batches(0)
        return [next(batches) for _ in range(PHOTOGRAPHS)]


def synthetic_batch(sizes: Sizes) -> Batch:
    """One random sample of the right shapes."""
    indices = torch.zeros(1, dtype=torch.int64)
    moments, context = make_inputs(
        sizes.unet,
        indices,
        latent_size=sizes.latent,
        context_tokens=sizes.context_tokens,
        seed=SEED,
    )
    return Batch(indices, moments, ["random"], context)


def optimizer_step(
    unet: UNet, optimizer: torch.optim.AdamW, batches: list[Batch], stages: Stages, name: str
) -> float:
    """One float32 optimizer step over micro-batches; returns the mean loss.

    Gradients are freed afterwards.
    """
    diffusion = DiffusionStep(DiffusionConfig(), SEED)
    losses = []
    for number, batch in enumerate(batches, 1):
        part = f"{name} {number} of {len(batches)}"
        assert batch.context is not None
        with stages(f"{part}: forward"):
            loss = diffusion(unet, batch.moments, batch.context, batch.sample_indices)
        with stages(f"{part}: backward"):
            (loss / len(batches)).backward()
        losses.append(loss.item())
        del loss
    with stages(f"{name}: AdamW", batch=None):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(losses) / len(losses)


def train(shards: Path, sizes: Sizes, stages: Stages) -> tuple[UNet, dict[str, float]]:
    """A step on a random sample, then one on the photographs; returns the UNet and both losses."""
    with stages("UNet: build", batch=None):
        unet = UNet(sizes.unet)
        randomize(unet, SEED)  # no layer at 0, so that every gradient is there
    with stages("AdamW: build", batch=None):
        optimizer = build_optimizer(unet, Config())
    # The rate after the warm-up, so that a step moves the weights.
    optimizer.param_groups[0]["lr"] = Config().learning_rate
    step = partial(optimizer_step, unet, optimizer, stages=stages)
    losses = {"random sample": step([synthetic_batch(sizes)], name="random sample")}
    losses["photographs"] = step(load_batches(shards, sizes, stages), name="photograph")
    return unet, losses


@torch.no_grad()
def sample_latents(unet: UNet, sizes: Sizes, stages: Stages) -> torch.Tensor:
    """DDIM latents (B, 4, S, S) of the photographs' text states, with guidance."""
    unet.eval().requires_grad_(False)
    shape = (sizes.unet.in_channels, sizes.latent, sizes.latent)
    numbers = normal(SEED, Stream.SAMPLER, torch.arange(PHOTOGRAPHS), math.prod(shape))
    noise = numbers.view(PHOTOGRAPHS, *shape)
    context = _text_states(sizes, range(PHOTOGRAPHS))
    uncond = _text_states(sizes, range(PHOTOGRAPHS, PHOTOGRAPHS + 1))
    name = f"DDIM: {DDIM_STEPS} steps with guidance, batch {PHOTOGRAPHS}"
    with stages(name, batch=PHOTOGRAPHS):
        return ddim_sample(unet, noise, context, uncond, DiffusionConfig(), steps=DDIM_STEPS)


@torch.no_grad()
def decode_pictures(latents: torch.Tensor, output: Path, sizes: Sizes, stages: Stages) -> list[str]:
    """Decode latents (B, 4, S, S) one by one into PNG files; returns their names."""
    from PIL import Image

    autoencoder = _autoencoder(sizes)
    names = []
    for number, latent in enumerate(latents, 1):
        with stages(f"picture {number}: autoencoder decode, PNG"):
            image = autoencoder.decode(latent[None] / DiffusionConfig().latent_scale)[0]
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
            names.append(f"picture_{number}.png")
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(output / names[-1])
    return names


def measure(images_dir: Path, output: Path, sizes: Sizes) -> Result[StageRow]:
    """All stages; each network is freed before the next is made.

    DataError where there are too few photographs.
    """
    stages, shards = Stages(), output / "moments"
    encode_photographs(images_dir, shards, sizes, stages)
    unet, losses = train(shards, sizes, stages)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    latents = sample_latents(unet, sizes, stages)
    del unet
    pictures = decode_pictures(latents, output, sizes, stages)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    provenance = Provenance.of_this_run("full_size_cpu", machine, versions)
    details = {
        "unet_parameters": parameters,
        "image_size": sizes.image,
        "latent_size": sizes.latent,
        "losses": losses,
        "pictures": pictures,
        "note": NOTE,
    }
    return Result("full_size_cpu", provenance, stages.rows, details)


def table(result: Result[StageRow]) -> str:
    """The stages, their sum and the losses as text."""
    rows, details = result.rows, result.details
    lines = [f"{'stage':60s} {'seconds':>9s} {'peak GiB':>9s}"]
    lines += [
        f"{row['stage']:60s} {row['seconds']:9.2f} {row['peak_memory_bytes'] / 2**30:9.2f}"
        for row in rows
    ]
    highest = max(row["peak_memory_bytes"] for row in rows)
    lines.append(f"{'all':60s} {sum(row['seconds'] for row in rows):9.2f} {highest / 2**30:9.2f}")
    lines += [f"loss, {name}: {loss:.4f}" for name, loss in details["losses"].items()]
    network = f"UNet of {details['unet_parameters']:,} parameters, {details['image_size']} px"
    return "\n".join([*lines, f"{network}. {details['note']}"])


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code: 2 where images or output cannot be used."""
    parser = command_parser("full_size_cpu", __doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of photographs with captions.jsonl")
    add("--output", type=Path, required=True, help="folder that receives the results")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        result = measure(options.images, options.output, Sizes())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write(options.output / "full_size_cpu.json", result)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
