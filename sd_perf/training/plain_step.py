"""The training step of the plain network: torch's autocast, DDP and fused AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch.nn.parallel import DistributedDataParallel

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.fast.graph import WARM_UP_PASSES
from sd_perf.models.build import ImageEncoder, TextEncoder
from sd_perf.reference.step import DiffusionStep
from sd_perf.training.ema import PlainEma
from sd_perf.training.optimizer import build_optimizer, optimizer_tensors, set_step_count
from sd_perf.training.static_batches import Inputs
from sd_perf.training.step import State, TrainStep


class PlainStep(TrainStep):
    """Micro-batches, forward, backward, gradient mean over ranks, AdamW, one after the other."""

    def __init__(
        self,
        unet: torch.nn.Module,
        config: Config,
        seed: int,
        world: World,
        text_encoder: TextEncoder | None,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        super().__init__(unet, config, world, text_encoder, image_encoder)
        self.seed = seed
        self.optimizer = build_optimizer(unet, config)
        decay = config.training.ema_decay
        self.ema = PlainEma(unet, decay) if decay else None
        self.diffusion = DiffusionStep(config.diffusion, seed, config.training.min_snr_gamma)
        self.diffusion.to(world.device)
        self.parallel: torch.nn.Module = unet
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                unet, device_ids=devices, gradient_as_bucket_view=True
            )

    def __call__(
        self, batches: Iterator[Batch], step_index: int
    ) -> tuple[torch.Tensor, list[Replacement]]:
        accumulate = self.config.training.accumulate_steps
        mean_loss = torch.zeros((), device=self.world.device)
        replacements: list[Replacement] = []
        for micro_step in range(accumulate):
            batch = next(batches)
            replacements += batch.replacements
            with self._gradient_sync(last=micro_step == accumulate - 1):
                batch = batch.to(self.world.device)
                moments, context = self.moments(batch).float(), self.context(batch).float()
                inputs = Inputs(batch.sample_indices, moments, context)
                loss = self._loss(inputs) / accumulate
                loss.backward()
            mean_loss += loss.detach()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(step_index)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.ema:
            self.ema.update(step_index)
        return mean_loss, replacements

    def _loss(self, inputs: Inputs) -> torch.Tensor:
        is_bf16 = self.config.training.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_bf16):
            samples = inputs.moments, inputs.context, inputs.sample_indices
            return self.diffusion(self.parallel, *samples)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a backward pass: ranks exchange gradients in a step's last one only."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def prepare(self) -> None:
        if self.world.device.type != "cuda" and not self.config.model.compile:
            return
        self.rehearse_encoders()
        inputs = Inputs.empty(self.config, self.world, torch.float32)
        inputs.draw(self.config, self.seed)
        for _ in range(WARM_UP_PASSES):
            self._loss(inputs).backward()
        self.optimizer.zero_grad(set_to_none=False)

    def gather_weights(self) -> None:
        pass  # every rank updates all

    def close(self) -> None:
        pass

    def buffers(self) -> dict[str, torch.Tensor]:
        model = {
            f"model.{name}": parameter.data for name, parameter in self.unet.named_parameters()
        }
        ema = self.ema.tensors() if self.ema else {}
        return model | optimizer_tensors(self.unet, self.optimizer) | ema

    def named(self, buffers: Mapping[str, torch.Tensor]) -> State:
        return dict(buffers)

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, tensor in self.buffers().items():
            tensor.copy_(tensors[name])
        set_step_count(self.optimizer, steps)
