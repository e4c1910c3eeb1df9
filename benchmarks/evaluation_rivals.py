"""Evaluation on a CPU beside its rivals: pictures of diffusers' pipeline, and pytorch-fid's FID.

    python -m benchmarks.evaluation_rivals [--parts tiny 100m fid] [--turns 3] [--output FILE.json]

Sides run in turns in the same run, and what counts is their ratio. On one thread they are timed in
CPU seconds, which other work on the machine does not add to; else by the wall.

- tiny, 100m: `generate` beside diffusers' StableDiffusionPipeline with the same weights of UNet and
  decoder, the same text states, steps, guidance and batch, float32 both; and beside both `generate`
  in bfloat16. `tiny` is the network of configs/smoke.yaml; both have one number of groups.
- fid: `sd-perf score` of a folder, beside pytorch-fid's `calculate_fid_given_paths`, from PNG files
  and a file of statistics to the number, the Inception's weights random. Both decode in the same
  thread or threads.

Needs diffusers, and for `fid` pytorch-fid and torchvision.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Report, run_command
from benchmarks.cpu_comparisons import smoke_config
from benchmarks.diffusers_training import build, comparable
from benchmarks.gpu_workload import randomize
from benchmarks.pairs import in_turns, pair_row
from sd_perf.config import Config, SamplingConfig, UNetConfig
from sd_perf.data.images import write_png
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.errors import UserError
from sd_perf.evaluation import score_folder as score_folder_module
from sd_perf.evaluation.fid import FeatureStatistics
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.inception import FidInception, folded
from sd_perf.evaluation.score_folder import Scoring
from sd_perf.models.build import build_sampling_unet
from sd_perf.models.key_maps import scheduler_config, to_diffusers
from sd_perf.models.merged_upsampling import merge_upsampling
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.optional import optional
from sd_perf.reference.unet import UNet
from sd_perf.tools.results import Conditions

NAME = "evaluation_rivals"
PARTS = ("tiny", "100m", "fid")
MEDIUM = UNetConfig(
    model_channels=128,
    channel_mult=(1, 2, 3, 3),
    num_head_channels=32,
    context_dim=512,
    resblock_groups=32,
)
"""90 million parameters"""
DECODER = AutoencoderConfig(channels=32, groups=16)
PIPELINE, OURS = "diffusers' StableDiffusionPipeline", "generate"
CPU = torch.device("cpu")


def config_of(part: str, tiny: bool) -> Config:
    """The config whose networks draw."""
    config = replace(smoke_config(tiny), sampling=SamplingConfig(steps=4, guidance_scale=8.0))
    if part == "100m" and not tiny:
        model = {name: getattr(MEDIUM, name) for name in vars(MEDIUM)}
        data = replace(config.data, latent_size=32, context_tokens=77)
        config = replace(config, model=replace(config.model, **model), data=data)
    return config


class Drawing:
    """Calls that draw the same pictures: by `generate`, and by diffusers' pipeline."""

    def __init__(self, config: Config, batch: int) -> None:
        torch.manual_seed(0)
        self.config, self.batch, network = config, batch, comparable(config)
        shape = batch, config.data.context_tokens, network.context_dim
        self.context, self.uncond = torch.randn(shape), torch.randn(1, *shape[1:])
        plain, autoencoder = UNet(network), AutoencoderKL(DECODER).requires_grad_(False).eval()
        randomize(plain, 0)
        self.pipeline = pipeline_of(plain, autoencoder, config)
        self.unets = {}
        for precision in ("fp32", "bf16"):
            evaluation = replace(config.evaluation, precision=precision)
            self.unets[precision] = build_sampling_unet(replace(config, evaluation=evaluation), CPU)
            self.unets[precision].load_state_dict(plain.state_dict())
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        merge_upsampling(autoencoder)  # both as `read_decoder` does
        self.decode = autoencoder.decode
        side, channels = config.data.latent_size, config.model.in_channels
        noise = normal(0, Stream.SAMPLER, torch.arange(batch), channels * side**2)
        self.noise = noise.view(-1, channels, side, side)

    def text(self, captions: list[str]) -> torch.Tensor:
        """Text states that are there already."""
        return self.uncond if captions == [""] else self.context

    def ours(self, precision: str = "fp32") -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        prompts = ["a caption"] * self.batch
        unet, config = self.unets[precision], self.config
        drawn = generate(
            unet, self.text, self.decode, prompts, config=config, seed=0, batch_size=self.batch
        )
        return next(drawn)

    def theirs(self) -> Any:
        """The pipeline's pictures (B, 3, H, W) of the same noise and text states."""
        sampling, side = self.config.sampling, 8 * self.config.data.latent_size
        return self.pipeline(
            prompt_embeds=self.context,
            latents=self.noise,
            negative_prompt_embeds=self.uncond.expand_as(self.context),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            height=side,
            width=side,
            output_type="pt",
        ).images


def levels(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """How far pictures in [0, 1] are apart, in levels of 8 bits."""
    apart = 255 * (ours - theirs).abs()
    return {"mean": apart.mean().item(), "largest": apart.max().item()}


def pipeline_of(unet: UNet, autoencoder: AutoencoderKL, config: Config) -> Any:
    """diffusers' pipeline of these weights, without safety checker, in eval mode."""
    other = build(unet.config).eval()
    other.load_state_dict(to_diffusers(unet.state_dict(), unet.config))
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TheirAutoencoder
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    sizes = autoencoder.config
    levels = len(sizes.widths)
    vae = TheirAutoencoder(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(sizes.widths),
        layers_per_block=sizes.num_res_blocks,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.groups,
        scaling_factor=config.diffusion.latent_scale,
    ).eval()
    vae.load_state_dict(to_diffusers(autoencoder.state_dict(), sizes))
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=other,
        scheduler=DDIMScheduler.from_config(scheduler_config(config.diffusion)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Fid:
    """Calls that score the same folder against the same statistics."""

    def __init__(self, folder: Path, pictures: int, side: int) -> None:
        torch.manual_seed(0)
        self.folder, self.statistics = folder / "pictures", folder / "statistics.npz"
        self.folder.mkdir()
        for number in range(pictures):
            write_png(torch.rand(3, side, side), self.folder / f"{number:05d}.png")
        real = FeatureStatistics(FidInception.num_features)
        real.update(torch.rand(4 * real.mean.numel(), real.mean.numel()))
        real.gaussian().save_npz(self.statistics)
        network = FidInception().requires_grad_(False)
        self.state = {name: value.clone() for name, value in network.state_dict().items()}
        self.network = folded(network)

    def ours(self) -> float:
        """By `score_folder`, with the network in memory."""
        read = score_folder_module.read_features
        score_folder_module.read_features = lambda path, device: self.network
        try:
            scoring = Scoring(Path("in memory"), self.statistics, threads=torch.get_num_threads())
            found = score_folder_module.score_folder(self.folder, scoring, CPU).fid
        finally:
            score_folder_module.read_features = read
        assert found is not None
        return found

    def theirs(self) -> float:
        """By pytorch-fid, with the same weights."""
        module = optional("pytorch_fid.inception", "the rival of FID is pytorch-fid", "dev")
        scores = optional("pytorch_fid.fid_score", "the rival of FID is pytorch-fid", "dev")
        load = module.load_state_dict_from_url
        module.load_state_dict_from_url = lambda *args, **options: self.state
        try:
            paths = [str(self.folder), str(self.statistics)]
            return float(scores.calculate_fid_given_paths(paths, 50, CPU, 2048, num_workers=0))
        finally:
            module.load_state_dict_from_url = load


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--threads", type=int, default=1, metavar="N", help="of CPU arithmetic (default: 1)")
    add("--turns", type=int, default=3, metavar="N", help="of each side (default: 3)")
    add("--pictures", type=int, default=64, metavar="N", help="in FID's folder (default: 64)")


def measure(options: argparse.Namespace) -> int:
    """The pairs asked for; returns the exit code."""
    if min(options.threads, options.turns, options.pictures) < 1:
        raise UserError("--threads, --turns, --pictures: give 1 or more")
    torch.set_num_threads(options.threads)
    if options.tiny:
        options.turns, options.parts = 1, ["tiny"]
    clock, now = ("CPU", time.process_time) if options.threads == 1 else ("wall", time.perf_counter)
    report = Report(NAME, options, CPU, ("work", "side", "rival"), ["diffusers"])
    conditions: Conditions = {"batch": None, "dtype": "float32", "cached": "weights, text states"}

    def add(work: str, sides: dict[str, Callable[[], object]], **details: Any) -> None:
        seconds = in_turns(sides, options.turns, 1, now)
        side, *others = seconds
        for name in [side, *others[:-1]]:
            row = pair_row(work, seconds, name, others[-1], conditions, options.threads, clock)
            report.add(row, **details)

    for part in (part for part in options.parts if part != "fid"):
        batch = 2 if part == "100m" or options.tiny else 16
        conditions["batch"] = batch
        drawing = Drawing(config_of(part, options.tiny), batch)
        exact, rounded, theirs = drawing.ours(), drawing.ours("bf16"), drawing.theirs()
        apart = {
            f"{part}: 8-bit levels off in bf16": levels(exact, rounded),
            f"{part}: 8-bit levels between generate and the pipeline": levels(exact, theirs),
        }
        sides: dict[str, Callable[[], object]] = {
            OURS: drawing.ours,
            f"{OURS}, bfloat16 UNet": partial(drawing.ours, "bf16"),
            PIPELINE: drawing.theirs,
        }
        add(f"pictures, {part}", sides, **apart)
    if "fid" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            fid = Fid(Path(folder), options.pictures, side=256)
            values = {"ours": fid.ours(), "pytorch-fid": fid.theirs()}
            conditions["batch"] = 50
            scorers: dict[str, Callable[[], object]] = {
                "sd-perf score": fid.ours,
                "pytorch-fid": fid.theirs,
            }
            add(f"FID of {options.pictures} PNGs", scorers, FID=values)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
