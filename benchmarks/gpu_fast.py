"""The fast training iteration, which is the trainer's own, by recipes that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.gpu_workload import FP32, MASTERS, Recipe, Workload, channels_last, randomize
from sd_kernels.registry import all_ops
from sd_kernels.selection import Choice, choose
from sd_kernels.spec import Target
from sd_perf.config import Config, UNetConfig
from sd_perf.distributed.world import World
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.graph import WARM_UP_PASSES, Runner
from sd_perf.fast.linear import load_precision_state, precision_state
from sd_perf.fast.ops import Op, Ops, Wrap
from sd_perf.fast.unet import FastUNet
from sd_perf.models.build import build_unet
from sd_perf.reference.unet import UNet
from sd_perf.training.iteration import Iteration


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
# As configs/recipes/h100x8_fp8.yaml trains: with scales of earlier steps, LayerNorm and GEGLU
# quantise what they write.
_FP8_FEED_FORWARD = {"feed_forward": "fp8_native", "fp8_recipe": "delayed"}
FAST_FP8 = replace(
    FAST_BF16,
    implementation="fast_fp8",
    precision="as fast_bf16, but the feed-forward layers multiply in FP8 with delayed scales",
    estimated_as="",
    sections={"precision": _FP8_FEED_FORWARD},
    # Plain torch has no FP8 layers, so the yardstick runs the operator's reference.
    yardstick=replace(
        FAST_BF16,
        implementation="fast_fp8_reference",
        yardstick=None,
        sections={"precision": _FP8_FEED_FORWARD, "kernels": {"fp8_linear": "reference"}},
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
    """The trainer's own iteration and runner (`sd_perf.training`), on one device.

    Weights and samples at the start are those of the plain workload with the same seed. Inputs stay
    on the device; between two iterations only sample indices and step number advance.
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
        self.kernels: dict[str, str] = {}
        choices = recipe.choices(config)

        def noted(name: str, op: Op) -> Op:
            """The operator; a call notes its backend in `kernels`."""

            def call(*arguments: Any, **options: Any) -> Any:
                self.kernels[name] = choices[name].backend
                return op(*arguments, **options)

            return wrap(name, call)

        ops = Ops.chosen(choices, noted)
        unet = recipe.fast_unet(config, device, ops)
        assert isinstance(unet, FastUNet)
        whole = self._trained_config(recipe.fast_config(config))
        world = World(rank=0, size=1, device=torch.device(device))
        self.trained = Iteration(whole, unet, self.seed, world, ops)
        self.runner = Runner(self.trained)
        self.unet, self.flat, self.loss = unet, self.trained.flat, self.trained.loss
        self.flat.collect = wrap("collect_gradients", self.flat.collect)  # type: ignore[method-assign]
        [inputs] = self.trained.batches.inputs
        inputs.moments.copy_(self.moments)
        inputs.context.copy_(self.context)
        self.moments, self.context = inputs.moments, inputs.context
        self.sample_indices = inputs.sample_indices
        self._precision = {name: state.clone() for name, state in precision_state(unet).items()}
        self.trained.optimizer.learning_rate.fill_(Config().learning_rate)
        self.reset()

    def _trained_config(self, config: Config) -> Config:
        """The config with this workload's batch and inputs."""
        training = dataclasses.replace(config.training, global_batch_size=self.batch)
        _, tokens, _ = self.context.shape
        side = self.moments.shape[-1]
        data = dataclasses.replace(config.data, latent_size=side, context_tokens=tokens)
        return dataclasses.replace(config, training=training, data=data)

    def masters(self) -> list[torch.Tensor]:
        masters = self.flat.views(self.flat.masters())
        # In the plain network's order; the flat buffer has that of their use.
        return [masters[name] for name, _ in self.unet.named_parameters()]

    def iteration(self) -> None:
        self.trained()
        self._advance()

    def capture(self) -> Callable[[], None]:
        """Warm up and capture as the trainer does, and return what replays one iteration."""
        if self.device != "cuda":
            return self.iteration
        self.runner.warm_up(self._rehearse)
        torch.cuda.empty_cache()  # for the graph's own memory
        self.runner.capture()

        def replay() -> None:
            self.runner.run()
            self._advance()

        return replay

    def _rehearse(self) -> None:
        saved = {name: state.clone() for name, state in precision_state(self.unet).items()}
        self.trained.rehearse(WARM_UP_PASSES)
        load_precision_state(self.unet, saved)

    def _advance(self) -> None:
        """Go on to the next samples and step, as the trainer does between two replays."""
        self.sample_indices += self.batch
        self.trained.optimizer.step_number += 1

    def restart(self) -> None:
        with torch.device(self.device):
            plain = channels_last(UNet(self.config))
        randomize(plain, self.seed)
        self.flat.set_masters(dict(plain.named_parameters()))
        optimizer = self.trained.optimizer
        optimizer.exp_avg.zero_()
        optimizer.exp_avg_sq.zero_()
        optimizer.step_number.fill_(1)
        load_precision_state(self.unet, self._precision)

    def changing(self) -> list[torch.Tensor]:
        flat, optimizer = self.flat, self.trained.optimizer
        halves = [flat.weights] if flat.remainders is None else [flat.weights, flat.remainders]
        moments = [optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_number]
        return [*halves, *moments, *precision_state(self.unet).values()]
