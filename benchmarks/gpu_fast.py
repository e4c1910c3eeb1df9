"""The fast training iteration: fast UNet, flat weights with float32 masters, fused AdamW."""

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
    """plain torch in the same number formats: this recipe may have twice its error. None: this
    recipe is itself only a yardstick"""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """what differs from the default config: values by section and field"""

    def fast_config(self, config: UNetConfig) -> Config:
        """The config with which the trainer would run this recipe."""
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
        # AdamW is chosen for the dtype of this recipe's buffers; which backends take its calls
        # depends on nothing else, so the benchmark's own call stands for that of any model.
        adamw = choose(
            "adamw",
            wanted=whole.kernels.adamw,
            target=target,
            cases=all_ops()["adamw"].cases[:1],
            dtype=self.weights,
            strict=whole.kernels.strict,
        )
        return {**choose_kernels(whole, target), "adamw": adamw}

    def unet(self, config: UNetConfig, device: str) -> torch.nn.Module:
        """The fast network with the chosen kernels."""
        return self.fast_unet(config, device, Ops.chosen(self.choices(config)))

    def fast_unet(self, config: UNetConfig, device: str, ops: Ops) -> torch.nn.Module:
        """The fast network with the operators `ops`, initialised on the device.

        Drawing 866 million initial weights takes seconds on a CPU.
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
    # The attention of its yardstick: others compute float32 in lower precision, which would hide
    # the errors of all other kernels.
    sections={"kernels": {"attention": "math"}},
)
FAST_BF16 = FastRecipe(
    "fast_bf16",
    "bf16 weights and activations; AdamW on fp32 masters kept as the bf16 weights and 16-bit "
    "remainders",
    torch.bfloat16,
    estimated_as="fused",
)
FAST_FP8 = replace(
    FAST_BF16,
    implementation="fast_fp8",
    precision="as fast_bf16, but the transformers' linear layers multiply in FP8",
    estimated_as="",
    sections={"precision": {"linear": "fp8_native"}},
    # Plain torch has no FP8 layers, so the yardstick runs the operator's reference.
    yardstick=replace(
        FAST_BF16,
        implementation="fast_fp8_reference",
        yardstick=None,
        sections={"precision": {"linear": "fp8_native"}, "kernels": {"fp8_linear": "reference"}},
    ),
)
FAST_TIMED = (FAST_BF16, FAST_FP8)
"""fast recipes whose throughput is measured"""
FAST_CHECKED = (FAST_FP32, *FAST_TIMED)
"""fast recipes whose correctness is checked"""


def unwrapped(name: str, op: Op) -> Op:
    """The operator itself."""
    return op


class FastWorkload(Workload):
    """Draws, network, loss and AdamW by the operators of sd_kernels.

    Weights, remainders and gradients are in one flat buffer each. Weights and samples at the start
    are those of the plain workload with the same seed.
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
        """`sizes` are those of `Workload`. `wrap` is called once for every operator."""
        super().__init__(config, batch, device, **sizes)
        whole = recipe.fast_config(config)
        self.kernels: dict[str, str] = {}
        choices = recipe.choices(config)

        def noted(name: str, op: Op) -> Op:
            """The operator; a call notes its backend in `kernels`."""

            def call(*arguments: Any, **options: Any) -> Any:
                self.kernels[name] = choices[name].backend
                return op(*arguments, **options)

            return wrap(name, call)

        ops = Ops.chosen(choices, noted)
        self.unet = recipe.fast_unet(config, device, ops)
        self.step = FusedDiffusionStep(whole, self.seed, ops).to(device)
        self.flat = FlatParameters(self.unet, recipe.weights)
        self.collect = wrap("collect_gradients", self.flat.collect_gradients)
        self.optimizer = FlatAdamW(self.flat, whole.optimizer, ops.adamw)
        self.optimizer.learning_rate.fill_(whole.learning_rate)
        self.reset()

    def masters(self) -> list[torch.Tensor]:
        return list(self.flat.views(self.flat.masters()).values())

    def training_loss(self) -> torch.Tensor:
        return self.step(self.unet, self.moments, self.context, self.sample_indices)

    def update(self) -> None:
        self.collect()
        (bucket,) = self.flat.buckets
        self.optimizer.step(bucket)
        self.optimizer.step_number += 1

    def restart(self) -> None:
        with torch.device(self.device):
            plain = channels_last(UNet(self.config))
        randomize(plain, self.seed)
        self.flat.set_masters(dict(plain.named_parameters()))
        self.optimizer.exp_avg.zero_()
        self.optimizer.exp_avg_sq.zero_()
        self.optimizer.step_number.fill_(1)

    def changing(self) -> list[torch.Tensor]:
        flat, optimizer = self.flat, self.optimizer
        halves = [flat.weights] if flat.remainders is None else [flat.weights, flat.remainders]
        return [*halves, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_number]
