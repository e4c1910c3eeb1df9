"""What parity compares: the config's network in three versions, on this machine, and where kernels
run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch

from sd_kernels.fp8_linear.reference import fp8_linear
from sd_kernels.registry import all_ops
from sd_kernels.selection import Choice
from sd_kernels.spec import Target
from sd_perf.config import Config, PrecisionConfig, UNetConfig
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Op, Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.reference.unet import UNet

Where = Literal["interpreter", "structure", "gpu"]
SEED = 2026
BATCH = 2
NARROW = 64
"""channels of a network whose optimizer steps any machine can hold in float64"""


@dataclass(frozen=True)
class Subject:
    """A config as one process compares it, and what it counts on the way."""

    config: Config
    where: Where
    executed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """calls by (op, backend)"""
    notes: list[str] = field(default_factory=list)
    """what was not compared, and why"""

    @classmethod
    def of(cls, config: Config, where: Where) -> Subject:
        """In the interpreter a tiny network, all of whose operators that have a Triton kernel run
        it."""
        if where != "interpreter":
            return cls(config, where)
        ours = {op: spec.ours for op, spec in all_ops().items() if spec.ours}
        kernels = dataclasses.replace(config.kernels, strict=False, **ours)
        data = dataclasses.replace(config.data, latent_size=4, context_tokens=5)
        return cls(
            dataclasses.replace(config, model=tiny(config.model), data=data, kernels=kernels), where
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.where == "gpu" else "cpu")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """float32, which shows faults, and what the config trains in."""
        is_low = self.config.training.precision == "bf16" and self.where != "interpreter"
        return ("float32", "bfloat16") if is_low else ("float32",)

    @property
    def side(self) -> int:
        """Rows and columns of the latents: the config's on a GPU, on a CPU no more than structure
        needs."""
        size, least = self.config.data.latent_size, 2 * self.config.model.downsampling
        return size if self.where == "gpu" else min(size, max(8, least))

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """The backend of every operator."""
        return choose_kernels(self.config, Target.here())

    @cached_property
    def light(self) -> Subject:
        """For optimizer steps, which take several times the weights' memory: on a CPU a narrower
        network's subject."""
        model = self.config.model
        if self.where == "gpu" or model.model_channels <= NARROW:
            return self
        self.notes.append(
            f"whole steps were compared with a network of {NARROW} channels, not "
            f"{model.model_channels}"
        )
        head = min(NARROW, model.num_head_channels)
        narrow = dataclasses.replace(
            model, model_channels=NARROW, num_head_channels=head, context_dim=NARROW
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=narrow))

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

    def plain(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The plain network; no layer at its initial zero, which would hide what stands before
        it."""
        with torch.device(self.device):
            unet = UNet(self.config.model)
        randomise(unet)
        return unet.to(dtype)

    def plain_networks(self, dtype: str = "float32") -> Iterator[torch.nn.Module]:
        """Plain torch as a CPU has it, NCHW, and as cuDNN does it: channels-last, biases added to
        what was rounded.

        With FP8 where the fast one has it.
        """
        for like_cudnn in (False, True):
            unet = self.plain()
            if like_cudnn:
                unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                for layer in (
                    layer for layer in unet.modules() if isinstance(layer, torch.nn.Conv2d)
                ):
                    layer.forward = partial(_bias_apart, layer)  # type: ignore[method-assign]
            if dtype == "bfloat16":
                round_to_fp8(unet, self.config.precision)
            yield unet

    def fast(self, dtype: str = "float32") -> FastUNet:
        """The fast network with the plain one's weights, its operators counted; FP8 belongs to
        bfloat16."""
        with torch.device(self.device):
            precision = self.config.precision if dtype == "bfloat16" else PrecisionConfig()
            unet = FastUNet(self.config.model, self.ops, precision)
        randomise(unet)
        return unet

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents (B, C, S, S), timesteps (B,) and context (B, T, D) in float32."""
        model, samples = self.config.model, torch.arange(BATCH, device=self.device)
        latents = normal(SEED, Stream.NOISE, samples, model.in_channels * self.side**2)
        context = normal(
            SEED, Stream.SYNTHETIC, samples, self.config.data.context_tokens * model.context_dim
        )
        timesteps = torch.tensor([3, 871], device=self.device)
        shape = BATCH, model.in_channels, self.side, self.side
        return latents.view(shape), timesteps, context.view(BATCH, -1, model.context_dim)

    def autocast(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """The precision as training has it: float32 weights, bfloat16 by autocast."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False
        )


def tiny(model: UNetConfig) -> UNetConfig:
    """A network with every kind of block that the interpreter takes in seconds; its groups differ
    as the model's do."""
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


def round_to_fp8(unet: torch.nn.Module, precision: PrecisionConfig) -> None:
    """Make the plain network's linear layers round to FP8 what the config multiplies in FP8."""
    for name, layer in unet.named_modules():
        classes = (layers for part, layers in _LAYERS.items() if part in name)
        layers = next(classes, None) if isinstance(layer, torch.nn.Linear) else None
        if layers and precision.of(layers) != "bf16":
            layer.forward = partial(_rounded, layer)


def _bias_apart(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return y + layer.bias[:, None, None].to(y.dtype)


def _rounded(layer: Any, x: torch.Tensor) -> Any:
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return fp8_linear(x.bfloat16(), layer.weight.bfloat16(), bias)


_LAYERS = {
    "attn2.to_k": "text",
    "attn2.to_v": "text",
    "attn": "attention",
    ".ff.": "feed_forward",
    "proj_in": "transformer_ends",
    "proj_out": "transformer_ends",
}
"""classes of the section `precision`, by what the names of their layers hold; the first that
fits"""


@torch.no_grad()
def randomise(unet: torch.nn.Module) -> None:
    """Fill all parameters in place, by order and shape alone: matrices keep the variance, norms are
    beside 1."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in unet.named_parameters():
        is_matrix, is_norm = parameter.dim() > 1, parameter.dim() == 1 and name.endswith("weight")
        std = parameter[0].numel() ** -0.5 if is_matrix else 0.1
        # By copying: drawn in place, the numbers would follow the order of the memory.
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + float(is_norm))


def kind(name: str, parameter: torch.Tensor) -> str:
    """What a parameter is, in the words of the report."""
    if name.endswith("bias"):
        return "biases"
    if parameter.dim() == 1:
        return "norms"
    return next((words for part, words in _KINDS.items() if part in name), "convolutions")


_KINDS = {
    "attn1": "self-attention",
    "attn2": "cross-attention",
    ".ff.": "feed-forward",
    "proj_in": "projections of the transformers",
    "proj_out": "projections of the transformers",
    "emb": "time embedding",
    "skip_connection": "skip convolutions",
}


def by_kind(unet: torch.nn.Module) -> dict[str, list[int]]:
    """Numbers of the parameters, in order, of each kind."""
    kinds: dict[str, list[int]] = {}
    for number, (name, parameter) in enumerate(unet.named_parameters()):
        kinds.setdefault(kind(name, parameter), []).append(number)
    return kinds
