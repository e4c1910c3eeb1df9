"""Sections `model`, `diffusion`, `text_encoder` and `precision`: what is computed, in which format.

Widths and timesteps default to the benchmark's network (Stable Diffusion v2, 512 x 512 pixels).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from sd_perf.config.rules import (
    ONE,
    Blocks,
    Count,
    NotNegative,
    PathText,
    Positive,
    Rule,
    Section,
    Timesteps,
    at_most,
)


@dataclass(frozen=True)
class UNetConfig(Section):
    """The denoising UNet. Defaults are the benchmark's 865,910,724-parameter network."""

    section = "model"

    in_channels: Annotated[int, ONE, at_most(4096)] = 4
    """channels of the latents"""
    out_channels: Annotated[int, ONE, at_most(4096)] = 4
    """channels of the prediction"""
    model_channels: Annotated[
        int, ONE, Rule(lambda channels: channels % 2 == 0, "even"), at_most(65_536)
    ] = 320
    """channels of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """channels of each level, in units of model_channels"""
    num_res_blocks: Blocks = 2
    """ResBlocks per level on the way down (one more on the way up)"""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """down-sampling factors of the levels that have transformers"""
    num_head_channels: Count = 64
    """channels per attention head"""
    context_dim: Annotated[int, ONE, at_most(65_536)] = 1024
    """channels of the text states"""
    resblock_groups: Count = 16
    """GroupNorm groups in ResBlocks and head (benchmark 16, published SD v2 32)"""
    transformer_groups: Count = 32
    """GroupNorm groups at the entrance of each transformer"""
    implementation: Literal["plain", "fast"] = "plain"
    """plain: torch's own layers; fast: the operators that the section `kernels` chooses"""
    activation_checkpointing: bool = False
    """recompute each block in the backward pass to save memory (fast only)"""
    compile: bool = False
    """torch.compile the code between the operators, as one graph (fast only)"""
    init: PathText = ""
    """begin from the UNet in this LDM .ckpt or .safetensors, diffusers folder or run; empty: random
    weights"""
    init_ema: bool = False
    """begin from the averaged weights that init holds beside the others"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_checkpointing", "compile"):
            right = f"false, since model.implementation is {self.implementation!r}"
            self.require(self.implementation == "fast" or not getattr(self, name), name, right)
        self.require(bool(self.init) or not self.init_ema, "init_ema", "false without model.init")
        same = self.out_channels == self.in_channels
        self.require(same, "out_channels", f"model.in_channels ({self.in_channels})")
        positive = bool(self.channel_mult) and min(self.channel_mult) > 0
        self.require(positive, "channel_mult", "one positive multiple per level")
        small = len(self.channel_mult) <= 12 and max(self.channel_mult) <= 64
        self.require(small, "channel_mult", "at most 12 levels, of multiples up to 64")
        factors = tuple(2**level for level in range(len(self.channel_mult)))
        drawn = set(self.attention_resolutions) <= set(factors)
        self.require(drawn, "attention_resolutions", f"drawn from the levels' factors {factors}")
        for channels in (mult * self.model_channels for mult in self.channel_mult):
            for name in ("num_head_channels", "resblock_groups", "transformer_groups"):
                right = f"a divisor of every level's channels (here {channels})"
                self.require(channels % getattr(self, name) == 0, name, right)

    @property
    def network(self) -> UNetConfig:
        """The network alone: fields of speed (plain) and of first weights at their defaults."""
        others = (*SPEED_ONLY, *FIRST_WEIGHTS)
        return replace(self, **{name: getattr(UNetConfig, name) for name in others})

    @property
    def transformer_channels(self) -> tuple[int, ...]:
        """Channels of each level that has transformers, from the first level to the last.

        The last level is always among them: the middle block has its channels and a transformer.
        """
        last = len(self.channel_mult) - 1
        levels = [
            level
            for level in range(last + 1)
            if level == last or 2**level in self.attention_resolutions
        ]
        return tuple(self.channel_mult[level] * self.model_channels for level in levels)

    @property
    def downsampling(self) -> int:
        """Down-sampling factor of the last level. The sides of latents must be multiples of it."""
        return 2 ** (len(self.channel_mult) - 1)


SPEED_ONLY = ("implementation", "activation_checkpointing", "compile")
"""fields of UNetConfig that change how fast the network is computed, not what it computes"""
FIRST_WEIGHTS = ("init", "init_ema")
"""fields of UNetConfig that say where its first weights come from"""


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """Noise schedule (LDM's "linear", diffusers' "scaled_linear"), target, scale of the latents."""

    section = "diffusion"

    num_timesteps: Timesteps = 1000
    """timesteps of the forward process"""
    beta_start: float = 0.00085
    """variance of the noise added at the first timestep"""
    beta_end: float = 0.0120
    """variance of the noise added at the last timestep"""
    latent_scale: Positive = 0.18215
    """latents = this x a sample of the autoencoder's moments"""
    prediction: Literal["v", "epsilon"] = "v"
    """what the UNet predicts; v: the benchmark's and published SD v2 of 768 pixels; epsilon: the
    noise, as SD v2's 512-base"""
    offset_noise: NotNegative = 0.0
    """standard deviation of noise that is one number per sample and channel, added to the noise of
    training (usual: 0.05 to 0.1); 0: none"""
    zero_terminal_snr: bool = False
    """rescale the noise schedule so that its last timestep is noise alone; pictures are then drawn
    from that timestep on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_order = 0 < self.beta_start <= self.beta_end < 1
        self.require(in_order, "beta_start", f"positive and at most beta_end ({self.beta_end})")
        has_target = self.prediction == "v" or not self.zero_terminal_snr
        right = "false with diffusion.prediction epsilon, which tells no latents from noise alone"
        self.require(has_target, "zero_terminal_snr", right)


@dataclass(frozen=True)
class TextEncoderConfig(Section):
    """The frozen OpenCLIP text encoder, for data.context open_clip and for sampling."""

    section = "text_encoder"

    model: PathText = "ViT-H-14"
    """open_clip model name, or the path of an open_clip model JSON"""
    weights: PathText = ""
    """open_clip .bin, .pt or .safetensors, LDM .ckpt, or "random" for seeded random weights"""


Arithmetic = Literal["bf16", "fp8_te", "fp8_native"]


@dataclass(frozen=True)
class PrecisionConfig(Section):
    """Number formats of linear layers in the fast UNet's transformers (not the time embedding)."""

    section = "precision"

    linear: Arithmetic = "bf16"
    """bf16: as training.precision; fp8_native: op fp8_linear; fp8_te: Transformer Engine"""
    attention: Arithmetic | None = None
    """q, k, v and output of the attentions, without the text's k, v; none: as linear"""
    feed_forward: Arithmetic | None = None
    """both layers of each feed-forward; none: as linear"""
    transformer_ends: Arithmetic | None = None
    """first and last layer of each transformer; none: as linear"""
    text: Arithmetic | None = None
    """keys and values of the text; none: as linear"""
    fp8_recipe: Literal["current", "delayed"] = "current"
    """FP8 scales: from this step's values, or from earlier steps' (kept in checkpoints)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = "current, since no layer is in FP8"
        in_fp8 = any(True for _ in self.in_fp8())
        self.require(self.fp8_recipe == "current" or in_fp8, "fp8_recipe", right)

    def of(self, layers: str) -> Arithmetic:
        """The arithmetic of a class of layers, one of LINEAR_LAYERS."""
        return getattr(self, layers) or self.linear

    def in_fp8(self) -> Iterator[tuple[str, str, str]]:
        """For each class of layers in FP8: its name, its arithmetic, and the field that says so."""
        for layers in LINEAR_LAYERS:
            if self.of(layers) != "bf16":
                yield layers, self.of(layers), layers if getattr(self, layers) else "linear"

    def uses(self, arithmetic: str) -> bool:
        """Whether any class of layers has this arithmetic."""
        return any(self.of(layers) == arithmetic for layers in LINEAR_LAYERS)


LINEAR_LAYERS = tuple(
    f.name for f in fields(PrecisionConfig) if f.name not in ("linear", "fp8_recipe")
)
"""classes of linear layers whose arithmetic can be chosen, each a field of PrecisionConfig"""
