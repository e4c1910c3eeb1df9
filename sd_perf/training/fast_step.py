"""The training step of the fast network: one iteration, a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from sd_kernels.adamw.reference import join_master
from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.fast.graph import WARM_UP_PASSES, Runner
from sd_perf.fast.linear import load_precision_state, precision_state
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.models.build import ImageEncoder, TextEncoder
from sd_perf.runs.checkpoint_files import Piece
from sd_perf.training.flat import fill_part
from sd_perf.training.iteration import Iteration
from sd_perf.training.static_batches import Inputs
from sd_perf.training.step import State, TrainStep

STEPS_AHEAD = 2
"""steps that the host may queue before the GPU has done them: enough that the GPU never waits, and
so few that batches do not pile up"""


class FastStep(TrainStep):
    """Fills the static batches, then runs the iteration; see `training.iteration`."""

    def __init__(
        self,
        unet: FastUNet,
        config: Config,
        seed: int,
        world: World,
        text_encoder: TextEncoder | None,
        ops: Ops,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        super().__init__(unet, config, world, text_encoder, image_encoder)
        self.seed = seed
        self.iteration = Iteration(config, unet, seed, world, ops)
        self.divides_state = self.iteration.strategy.divides_state
        self.runner = Runner(self.iteration)
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(
        self, batches: Iterator[Batch], step_index: int
    ) -> tuple[torch.Tensor, list[Replacement]]:
        iteration, replacements = self.iteration, []
        if len(self._queued) == STEPS_AHEAD:
            self._queued.popleft().synchronize()
        for micro_step in range(iteration.accumulate):
            batch = next(batches)
            replacements += batch.replacements
            inputs = Inputs(batch.sample_indices, self.moments(batch), self.context(batch))
            iteration.batches.fill(micro_step, inputs)
        iteration.optimizer.learning_rate.fill_(self.learning_rate(step_index))
        iteration.optimizer.step_number.fill_(step_index + 1)
        if iteration.ema:
            iteration.ema.begin(step_index)
        self.runner.run()
        if self.world.device.type == "cuda":
            # Blocking: a thread that waits for it leaves the core to the loader.
            done = torch.cuda.Event(blocking=True)
            done.record()
            self._queued.append(done)
        return iteration.loss, replacements

    def prepare(self) -> None:
        is_cuda = self.world.device.type == "cuda"
        if is_cuda and self.config.training.cuda_graph == "auto":
            self.runner.warm_up(self.rehearse)
            # One rank may fail to record, and then all must leave.
            self.world.together(self.runner.capture)
        elif is_cuda or self.config.model.compile:
            self.rehearse()

    def gather_weights(self) -> None:
        # The next iteration begins with the same: nothing it computes with changes.
        self.iteration.gather_weights()

    def close(self) -> None:
        self.runner.close()

    def rehearse(self) -> None:
        """Run all of an iteration on synthetic samples; the state is the same afterwards."""
        self.rehearse_encoders()
        for inputs in self.iteration.batches.inputs:
            inputs.draw(self.config, self.seed)
        saved = {name: state.clone() for name, state in precision_state(self.unet).items()}
        self.iteration.rehearse(WARM_UP_PASSES)
        load_precision_state(self.unet, saved)

    def buffers(self) -> dict[str, torch.Tensor]:
        flat = self.iteration.flat
        buffers = {f"weights.{number}": share for number, share in enumerate(flat.shares())}
        if flat.remainders is not None:
            buffers["remainders"] = flat.remainders
        return buffers | self._float32_buffers()

    def _float32_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers (M,) of moments and, where there is one, of the average, by component."""
        optimizer, ema = self.iteration.optimizer, self.iteration.ema
        moments = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        return moments | ({"ema": ema.average} if ema else {})

    def named(self, buffers: Mapping[str, torch.Tensor]) -> State:
        shares = [buffers[f"weights.{i}"] for i in range(len(self.iteration.flat.buckets))]
        weights = self._by_name("model", torch.cat(shares))
        if "remainders" in buffers:
            # Joined parameter by parameter, and in the thread that writes: as a whole it takes 18
            # bytes a parameter.
            rest = self._by_name("model", buffers["remainders"])
            weights = {name: _joined(weights[name], rest[name]) for name in weights}
        for component in self._float32_buffers():
            weights |= self._by_name(component, buffers[component])
        return weights

    def _by_name(self, component: str, buffer: torch.Tensor) -> State:
        """The tensors in a buffer (M,) by checkpoint name; pieces where state is divided."""
        flat = self.iteration.flat
        if not self.divides_state:
            return {f"{component}.{name}": view for name, view in flat.views(buffer).items()}
        return {
            f"{component}.{name}": Piece.of(flat.parameters[name], part.values, part.begin)
            for name, part in flat.parts(buffer).items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        flat = self.iteration.flat
        flat.set_masters({name: tensors[f"model.{name}"] for name in flat.parameters})
        for component, buffer in self._float32_buffers().items():
            for name, part in flat.parts(buffer).items():
                parameter, stored = flat.parameters[name], tensors[f"{component}.{name}"]
                fill_part(part, torch.empty_like(parameter, dtype=torch.float32).copy_(stored))


def _joined(weights: Any, remainders: Any) -> Any:
    """The float32 masters of a tensor, or of a piece of one."""
    if isinstance(weights, Piece):
        return replace(weights, values=join_master(weights.values, remainders.values))
    return join_master(weights, remainders)
