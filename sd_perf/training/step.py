"""One optimizer step: micro-batches, forward, backward, gradient mean over ranks, AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.fast.linear import amax_buffer, update_scales
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.reference.step import DiffusionStep
from sd_perf.training.optimizer import build_optimizer, learning_rate

TextEncoder = Callable[[list[str]], torch.Tensor]
"""B captions -> text states (B, T, D)"""


def build_diffusion_step(config: Config, seed: int, ops: Ops | None) -> torch.nn.Module:
    """The fused diffusion step with the operators `ops`; the plain one where that is None."""
    if ops is None:
        return DiffusionStep(config.diffusion, seed)
    return FusedDiffusionStep(config, seed, ops)


class TrainStep:
    """`step(batches, step_index) -> loss` on this rank; owns the optimizer.

    `ops` are the chosen operators of the fast network, None for the plain one.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        config: Config,
        seed: int,
        world: World,
        text_encoder: TextEncoder | None,
        ops: Ops | None,
    ) -> None:
        self.unet = unet
        self.config = config
        self.world = world
        self.text_encoder = text_encoder
        self.optimizer = build_optimizer(unet, config)
        self.diffusion = build_diffusion_step(config, seed, ops).to(world.device)
        self.parallel: torch.nn.Module = unet
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                unet, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def __call__(
        self, batches: Iterator[Batch], step_index: int
    ) -> tuple[torch.Tensor, list[Replacement]]:
        """Take one step; returns the loss and the bad samples that were replaced.

        The loss is the mean over the rank's samples, a detached scalar on the device.
        """
        accumulate = self.config.training.accumulate_steps
        mean_loss = torch.zeros((), device=self.world.device)
        replacements: list[Replacement] = []
        for micro_step in range(accumulate):
            batch = next(batches)
            replacements += batch.replacements
            with self._gradient_sync(last=micro_step == accumulate - 1):
                loss = self._loss(batch.to(self.world.device)) / accumulate
                loss.backward()
            mean_loss += loss.detach()
        self.optimizer.param_groups[0]["lr"] = learning_rate(
            self.config.optimizer, self.config.learning_rate, step_index
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._end_of_scaling_step()
        return mean_loss, replacements

    def _loss(self, batch: Batch) -> torch.Tensor:
        is_bf16 = self.config.training.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_bf16):
            context = batch.context
            if context is None:
                if self.text_encoder is None:
                    raise ValueError("the batch holds captions only: the step needs a text encoder")
                context = self.text_encoder(batch.captions)
            return self.diffusion(
                self.parallel, batch.moments, context.float(), batch.sample_indices
            )

    def _end_of_scaling_step(self) -> None:
        """Set the next step's FP8 scales from the magnitudes that all ranks saw."""
        amax = amax_buffer(self.unet)
        if amax is not None and self.world.size > 1:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX)
        update_scales(self.unet)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a backward pass: ranks exchange gradients in a step's last one only."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return contextlib.nullcontext()
