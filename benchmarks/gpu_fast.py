"""The training iteration of sd_kernels' operators: the fast UNet, flat bf16 weights with masters,
fused AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.gpu_workload import FP32, MASTERS, Recipe, Workload, channels_last, randomize
from sd_kernels.registry import all_ops
from sd_kernels.selection import Choice, choose
from sd_kernels.spec import Target
from sd_perf.config import Config, UNetConfig
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Op, Ops, Wrap
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.models.build import build_unet
from sd_perf.reference.unet import UNet
from sd_perf.training.flat import FlatParameters
from sd_perf.training.optimizer import FlatAdamW


@dataclass(frozen=True)
class FastRecipe(Recipe):
    """One way to run the fast UNet."""

    yardstick: Recipe | None = MASTERS
    """plain operations in the same number formats, whose error this one's may be twice of; none: it
    is a yardstick"""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """what differs from the default config: values by section and field, such as kernels that are
    named"""

    def fast_config(self, config: UNetConfig) -> Config:
        """The whole config with which a trainer would run this."""
        whole = Config(model=dataclasses.replace(config, implementation="fast"))
        precision = {"precision": "bf16" if self.weights == torch.bfloat16 else "fp32"}
        sections = {"training": precision, **self.sections}
        changed = {
            name: dataclasses.replace(getattr(whole, name), **values)
            for name, values in sections.items()
        }
        return dataclasses.replace(whole, **changed)

    def choices(self, config: UNetConfig) -> dict[str, Choice]:
        """The backend of every operator."""
        whole, target = self.fast_config(config), Target.here()
        # For another model than the benchmark's, no calls are looked at; whether the optimizer's
        # can be made depends on the buffers' formats alone.
        calls = all_ops()["adamw"].cases[:1]
        adamw = choose(
            "adamw", whole.kernels.adamw, target, calls, self.weights, whole.kernels.strict
        )
        return {**choose_kernels(whole, target), "adamw": adamw}

    def unet(self, config: UNetConfig, device: str) -> torch.nn.Module:
        """The fast network with the chosen kernels."""
        return self.fast_unet(config, device, Ops.chosen(self.choices(config)))

    def fast_unet(self, config: UNetConfig, device: str, ops: Ops) -> torch.nn.Module:
        """The network, made where it will live.

        To draw 866 million initial weights takes milliseconds on a GPU and seconds on a CPU.
        """
        with torch.device(device):
            whole = self.fast_config(config)
            return build_unet(whole, seed=0, device=torch.device(device), ops=ops)

    def workload(self, config: UNetConfig, batch: int, device: str, **sizes: Any) -> Workload:
        return FastWorkload(self, config, batch, device, **sizes)


FAST_FP32 = FastRecipe(
    "fast_fp32",
    "fp32, TF32 off; flat buffers",
    torch.float32,
    yardstick=FP32,
    # As its yardstick's: other attentions emulate float32, and would hide what the kernels around
    # them do.
    sections={"kernels": {"attention": "math"}},
)
FAST_BF16 = FastRecipe(
    "fast_bf16",
    "bf16 weights and activations; AdamW on fp32 masters kept as the bf16 weights and 16-bit "
    "remainders",
    torch.bfloat16,
    way="fused",
)
FAST_FP8 = replace(
    FAST_BF16,
    implementation="fast_fp8",
    precision="as fast_bf16, but the transformers' linear layers multiply in FP8",
    way="",
    sections={"precision": {"linear": "fp8_native"}},
    # Plain torch has no FP8; what rounding to it costs is known from the operator's reference.
    yardstick=replace(
        FAST_BF16,
        implementation="fast_fp8_reference",
        yardstick=None,
        sections={"precision": {"linear": "fp8_native"}, "kernels": {"fp8_linear": "reference"}},
    ),
)
FAST_TIMED = (FAST_BF16, FAST_FP8)
"""those that rows are measured of"""
FAST_CHECKED = (FAST_FP32, *FAST_TIMED)


def unwrapped(name: str, op: Op) -> Op:
    """The operator itself."""
    return op


class FastWorkload(Workload):
    """Draws, network, loss and AdamW by sd_kernels' operators; weights, remainders, gradients in a
    flat buffer each.

    It starts from the weights of the plain one with the same seed, and from the same samples.
    """

    def __init__(
        self,
        recipe: FastRecipe,
        config: UNetConfig,
        batch: int,
        device: str,
        wrap: Wrap = unwrapped,
        **sizes: int,
    ) -> None:
        """Other sizes as `Workload` has them. `wrap` is called once for every operator."""
        super().__init__(config, batch, device, **sizes)
        whole = recipe.fast_config(config)
        self.kernels: dict[str, str] = {}
        choices = recipe.choices(config)

        def noted(name: str, op: Op) -> Op:
            """The operator, which leaves its backend in `kernels` when it is called."""

            def call(*arguments: Any, **options: Any) -> Any:
                self.kernels[name] = choices[name].backend
                return op(*arguments, **options)

            return wrap(name, call)

        ops = Ops.chosen(choices, noted)
        self.unet = recipe.fast_unet(config, device, ops)
        self.step = FusedDiffusionStep(whole, self.seed, ops).to(device)
        self.flat = FlatParameters(self.unet, recipe.weights)
        self.collect = wrap("collect_gradients", self.flat.collect_gradients)
        self.optimizer = FlatAdamW(self.flat, whole.optimizer, whole.learning_rate, ops.adamw)
        self.reset()

    def masters(self) -> list[torch.Tensor]:
        return list(self.flat.masters().values())

    def training_loss(self) -> torch.Tensor:
        return self.step(self.unet, self.moments, self.context, self.sample_indices)

    def update(self) -> None:
        self.optimizer.step(self.collect())

    def restart(self) -> None:
        with torch.device(self.device):
            plain = channels_last(UNet(self.config))
        randomize(plain, self.seed)
        self.flat.set_masters(dict(plain.named_parameters()))
        self.optimizer.reset()

    def changing(self) -> list[torch.Tensor]:
        flat, optimizer = self.flat, self.optimizer
        halves = [flat.weights] if flat.remainders is None else [flat.weights, flat.remainders]
        return [*halves, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_count]
