"""One optimizer step: micro-batches, forward, backward, gradient mean over ranks, AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from sd_kernels.spec import Target
from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.reference.step import DiffusionStep
from sd_perf.training.optimizer import build_optimizer, learning_rate

TextEncoder = Callable[[list[str]], torch.Tensor]


def build_diffusion(config: Config, seed: int) -> torch.nn.Module:
    """The plain diffusion step, or for the fast network that of the chosen operators."""
    if config.model.implementation == "plain":
        return DiffusionStep(config.diffusion, seed)
    return FusedDiffusionStep(config, seed, choose_kernels(config, Target.here()))


class TrainStep:
    """`step(batches, step_index) -> loss` on this rank; owns the optimizer and the rank's view of
    the UNet."""

    def __init__(
        self,
        unet: torch.nn.Module,
        config: Config,
        seed: int,
        world: World,
        text_encoder: TextEncoder | None,
    ) -> None:
        self.unet = unet
        self.config = config
        self.world = world
        self.text_encoder = text_encoder
        self.optimizer = build_optimizer(unet, config)
        self.diffusion = build_diffusion(config, seed).to(world.device)
        self.parallel: torch.nn.Module = unet
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                unet, device_ids=devices, gradient_as_bucket_view=True
            )

    def __call__(
        self, batches: Iterator[Batch], step_index: int
    ) -> tuple[torch.Tensor, list[Replacement]]:
        """Mean loss of the rank's samples (a detached scalar on the device) and the bad samples
        replaced."""
        accumulate = self.config.training.accumulate_steps
        total = torch.zeros((), device=self.world.device)
        replacements: list[Replacement] = []
        for micro_step in range(accumulate):
            batch = next(batches)
            replacements += batch.replacements
            with self._gradient_sync(last=micro_step == accumulate - 1):
                loss = self._loss(batch.to(self.world.device)) / accumulate
                loss.backward()
            total += loss.detach()
        self.optimizer.param_groups[0]["lr"] = learning_rate(
            self.config.optimizer, self.config.learning_rate, step_index
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return total, replacements

    def _loss(self, batch: Batch) -> torch.Tensor:
        bf16 = self.config.training.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            context = batch.context
            if context is None:
                if self.text_encoder is None:
                    raise ValueError(
                        "the batch has captions only, and the step was built without a text encoder"
                    )
                context = self.text_encoder(batch.captions)
            return self.diffusion(
                self.parallel, batch.moments, context.float(), batch.sample_indices
            )

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return contextlib.nullcontext()
