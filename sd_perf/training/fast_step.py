"""The training step of the fast network: one iteration, a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.fast.linear import load_precision_state, precision_state
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.runs.checkpoint_files import Piece
from sd_perf.training.flat import fill_part
from sd_perf.training.graph import WARM_UP_PASSES, Runner
from sd_perf.training.iteration import Iteration
from sd_perf.training.step import State, TextEncoder, TrainStep

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
    ) -> None:
        super().__init__(unet, config, world, text_encoder)
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
            iteration.batches.fill(micro_step, batch, self.context(batch))
        iteration.optimizer.learning_rate.fill_(self.learning_rate(step_index))
        iteration.optimizer.step_number.fill_(step_index + 1)
        self.runner.run()
        if self.world.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
            self._queued.append(done)
        return iteration.loss, replacements

    def prepare(self) -> None:
        is_cuda = self.world.device.type == "cuda"
        if is_cuda and self.config.training.cuda_graph == "auto":
            self.runner.capture(self.rehearse)
        elif is_cuda or self.config.model.compile:
            self.rehearse()

    def rehearse(self) -> None:
        """Run all of an iteration on synthetic samples; the state is the same afterwards."""
        for inputs in self.iteration.batches.inputs:
            inputs.draw(self.config, self.seed)
        saved = {name: state.clone() for name, state in precision_state(self.unet).items()}
        self.iteration.rehearse(WARM_UP_PASSES)
        load_precision_state(self.unet, saved)

    def state(self) -> State:
        flat, optimizer = self.iteration.flat, self.iteration.optimizer
        buffers = {
            "model": flat.masters(),
            "exp_avg": optimizer.exp_avg,
            "exp_avg_sq": optimizer.exp_avg_sq,
        }
        if not self.divides_state:
            return {
                f"{component}.{name}": view
                for component, buffer in buffers.items()
                for name, view in flat.views(buffer).items()
            }
        return {
            f"{component}.{name}": Piece.of(flat.parameters[name], part.values, part.begin)
            for component, buffer in buffers.items()
            for name, part in flat.parts(buffer).items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        flat, optimizer = self.iteration.flat, self.iteration.optimizer
        flat.set_masters({name: tensors[f"model.{name}"] for name in flat.parameters})
        for component in ("exp_avg", "exp_avg_sq"):
            for name, part in flat.parts(getattr(optimizer, component)).items():
                parameter, stored = flat.parameters[name], tensors[f"{component}.{name}"]
                fill_part(part, torch.empty_like(parameter, dtype=torch.float32).copy_(stored))
