"""What one process compares: a config's networks and their inputs, in one place to run kernels.

Shape letters: B samples, C latent channels, S side of the latents, T text tokens, D context
channels.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch

from sd_kernels.registry import all_ops
from sd_kernels.selection import Choice
from sd_kernels.spec import Target
from sd_perf.config import Config, PrecisionConfig, UNetConfig
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Op, Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.models.build import build_unet
from sd_perf.reference.unet import UNet
from sd_perf.runs.parity_record import Level, Where
from sd_perf.tools.parity.comparison import Comparer
from sd_perf.tools.parity.parameters import randomise

SEED = 2026
BATCH = 2
NARROW = 64
"""channels of a network that any machine can take optimizer steps with in float64"""


@dataclass(frozen=True)
class ParityCase:
    """A config in one of the places where kernels run, and what is noted of its comparisons."""

    config: Config
    where: Where
    executed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """calls of the fast path's operators, by (op, backend)"""
    notes: list[str] = field(default_factory=list)
    """what was not compared, and why"""

    @classmethod
    def of(cls, config: Config, where: Where) -> ParityCase:
        """The config as this place can run it.

        The interpreter gets a tiny network, all of whose operators that have a Triton kernel run
        it. Elsewhere the config is left as it is.
        """
        if where != "interpreter":
            return cls(config, where)
        ours = {op: spec.ours for op, spec in all_ops().items() if spec.ours}
        tiny = dataclasses.replace(
            config,
            model=tiny_network(config.model),
            data=dataclasses.replace(config.data, latent_size=4, context_tokens=5),
            kernels=dataclasses.replace(config.kernels, **ours, strict=False),
        )
        return cls(tiny, where)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.where == "gpu" else "cpu")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """float32, in which a fault is not hidden by rounding, and what the config trains in."""
        is_low = self.config.training.precision == "bf16" and self.where != "interpreter"
        return ("float32", "bfloat16") if is_low else ("float32",)

    @property
    def side(self) -> int:
        """S: the config's on a GPU; on a CPU at most what all levels of the network need."""
        size, least = self.config.data.latent_size, 2 * self.config.model.downsampling
        return size if self.where == "gpu" else min(size, max(8, least))

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """The backend of every operator, chosen once for all comparisons."""
        return choose_kernels(self.config, Target.here())

    @cached_property
    def narrowed(self) -> ParityCase:
        """The case for whole optimizer steps, which take several times the memory of the weights.

        On a CPU its network has at most `NARROW` channels; counts and notes are shared.
        """
        model = self.config.model
        if self.where == "gpu" or model.model_channels <= NARROW:
            return self
        self.notes.append(
            f"whole steps were compared with a network of {NARROW} channels, not "
            f"{model.model_channels}"
        )
        narrow = dataclasses.replace(
            model,
            model_channels=NARROW,
            num_head_channels=min(NARROW, model.num_head_channels),
            context_dim=NARROW,
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=narrow))

    def comparer(self, level: Level, dtype: str) -> Comparer:
        """What makes this case's comparisons of a level at a dtype."""
        return Comparer(level=level, where=self.where, dtype=dtype)

    @cached_property
    def ops(self) -> Ops:
        """Every operator by its chosen backend; calls are counted in `executed`."""
        return Ops.chosen(self.choices, self._counting)

    def _counting(self, op: str, function: Op) -> Op:
        backend = self.choices[op].backend

        def call(*args: Any, **options: Any) -> Any:
            self.executed[op, backend] += 1
            return function(*args, **options)

        return call

    def plain_network(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The plain network with weights of `randomise`; in float64 it is the truth.

        It is in NCHW on a GPU, too, where a training run builds it in channels-last.
        """
        with torch.device(self.device):
            unet = UNet(self.config.model)
        randomise(unet, SEED)
        return unet.to(dtype)

    def fast_network(self, dtype: str) -> FastUNet:
        """The fast network with the plain one's weights (float32), whose operators are counted.

        A training run's own builder makes it. `dtype` is what it will compute in: FP8 layers are
        part of bfloat16, not of float32. Their scales are current ones: delayed ones would be those
        of steps that were not made.
        """
        precision = dataclasses.replace(self.config.precision, fp8_recipe="current")
        config = dataclasses.replace(
            self.config,
            # Calls that are counted cannot be compiled.
            model=dataclasses.replace(self.config.model, compile=False),
            precision=precision if dtype == "bfloat16" else PrecisionConfig(),
        )
        unet = build_unet(config, seed=SEED, device=self.device, ops=self.ops)
        randomise(unet, SEED)
        return cast(FastUNet, unet)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents (B, C, S, S), timesteps (B,) int64 and context (B, T, D); floats are float32."""
        model, samples = self.config.model, torch.arange(BATCH, device=self.device)
        latents = normal(SEED, Stream.NOISE, samples, model.in_channels * self.side**2)
        context = normal(
            SEED, Stream.SYNTHETIC, samples, self.config.data.context_tokens * model.context_dim
        )
        timesteps = torch.tensor([3, 871], device=self.device)
        shape = BATCH, model.in_channels, self.side, self.side
        return latents.view(shape), timesteps, context.view(BATCH, -1, model.context_dim)

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        """The precision of training: weights stay float32, bfloat16 comes by autocast."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False
        )


def tiny_network(model: UNetConfig) -> UNetConfig:
    """A network with every kind of block, small enough for seconds in Triton's interpreter.

    Its blocks and its transformers differ in their number of groups, as the model's do.
    """
    return dataclasses.replace(
        model,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        context_dim=16,
        resblock_groups=16,
        transformer_groups=32,
    )
