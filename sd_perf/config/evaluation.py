"""Sections `sampling` and `evaluation`: how pictures are drawn and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sd_perf.config.rules import (
    Count,
    NotNegative,
    PathText,
    Pictures,
    Rule,
    Section,
    at_most,
)


@dataclass(frozen=True)
class SamplingConfig(Section):
    """DDIM with classifier-free guidance."""

    section = "sampling"

    steps: Count = 50
    """DDIM steps"""
    guidance_scale: NotNegative = 8.0
    """1 is no guidance"""
    every_samples: Annotated[
        int | None,
        Rule(lambda samples: samples > 0, "at least 1, or none to draw none"),
        at_most(10**12),
    ] = None
    """distance between grids of fixed prompts drawn while training, samples (rounded up to whole
    steps); none: no pictures. The time counts as training's"""
    prompts: Annotated[
        tuple[str, ...],
        Rule(lambda prompts: len(prompts) <= 64, "at most 64 prompts"),
        Rule(lambda prompts: all(map(str.strip, prompts)), "prompts that are not empty"),
    ] = ()
    """prompts of these grids; none: the first 8 of evaluation.prompts"""


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """How `sd-perf evaluate` scores checkpoints."""

    section = "evaluation"

    prompts: PathText = ""
    """captions to draw: a .tsv with a column `caption` (the benchmark's), or captions.jsonl"""
    num_prompts: Annotated[int, Rule(lambda prompts: prompts > 1, "at least 2"), at_most(10**7)] = (
        30_000
    )
    """prompts drawn, from the top of the file"""
    batch_size: Pictures = 32
    """pictures drawn at a time"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the UNet, the decoder and FID's Inception; bf16 is faster and shifts the scores a little:
    docs/benchmarks.md has the measured error"""
    autoencoder: PathText = ""
    """file of the decoder: .onnx, .ckpt or .safetensors"""
    features: PathText = ""
    """network of FID's features: the FID Inception (.pth) or a feature net (.safetensors)"""
    statistics: PathText = ""
    """.npz with mu and sigma of the real pictures' features"""
    clip_model: PathText = "ViT-H-14"
    """open_clip model of the CLIP score, or the path of a model JSON"""
    clip_weights: PathText = ""
    """file of the weights of clip_model"""
    fid_target: float = 90.0
    """highest FID of a converged checkpoint; clip_target must hold at the same one"""
    clip_target: float = 0.15
    """lowest CLIP score of a converged checkpoint"""
    judge: bool = False
    """also count pictures that show their caption, read by a program (tiny world only)"""
