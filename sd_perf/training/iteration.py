"""The whole training iteration of the fast network, as a CUDA graph can capture it.

It reads its inputs, learning rate and step number from tensors that stay where they are, never asks
the device for a number, and changes weights, moments and precision state in place.
docs/training_step.md tells what is in it and what is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_perf.config import Config
from sd_perf.distributed.strategies import Handle, build_strategy
from sd_perf.distributed.world import World
from sd_perf.fast.linear import amax_buffer, update_scales
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.fast.unet import FastUNet
from sd_perf.training.ema import FlatEma
from sd_perf.training.exchange import Exchange
from sd_perf.training.flat import FlatParameters
from sd_perf.training.optimizer import FlatAdamW
from sd_perf.training.static_batches import StaticBatches

BUCKETS = 6
"""parts in which several ranks exchange gradients and weights: fewer leave more of the exchange
after the backward pass, more make collectives too small for the network's bandwidth"""


class Iteration:
    """`iteration()` trains on `batches.inputs` once and leaves the mean loss in `loss`.

    The loss is this rank's mean over its samples, float32. After a loss that is not finite it stays
    NaN, so that whoever reads it later sees what he missed.
    """

    def __init__(self, config: Config, unet: FastUNet, seed: int, world: World, ops: Ops) -> None:
        """`unet` is float32; in precision bf16 its parameters become bfloat16 here."""
        training = config.training
        self.world, self.unet = world, unet
        self.accumulate = training.accumulate_steps
        # torch.compile cannot trace the waits for gathered weights.
        is_whole = training.strategy == "auto" and config.model.compile
        self.strategy = build_strategy("ddp" if is_whole else training.strategy, world)
        uses = unet.parameters_by_use()
        self.flat = FlatParameters(
            unet,
            torch.bfloat16 if training.precision == "bf16" else torch.float32,
            # A sum of micro-batches in bfloat16 would lose what is small beside the first.
            grads_dtype=torch.float32 if self.accumulate > 1 else None,
            order=[name for _, names in uses for name in names],
            buckets=BUCKETS if world.size > 1 else 1,
            share=self.strategy.share,
        )
        self.optimizer = FlatAdamW(self.flat, config.optimizer, ops.adamw)
        self.ema = FlatEma(self.flat, training.ema_decay) if training.ema_decay else None
        self.diffusion = FusedDiffusionStep(config, seed, ops).to(world.device)
        self.batches = StaticBatches(config, world)
        self.loss = torch.zeros((), device=world.device)
        self._poison = torch.zeros((), device=world.device)
        self._share = torch.full_like(self.loss, 1 / (self.accumulate * world.size))
        self._exchange = Exchange(self.flat, self.strategy, uses)

    def __call__(self) -> None:
        """Forward, backward, exchange and update; see the class."""
        handles = self.accumulate_gradients()
        shared = self._share_magnitudes()
        for bucket in reversed(self.flat.buckets):
            if handle := handles[bucket.begin]:
                handle.wait()
            self.optimizer.step(bucket)
            if self.ema:
                self.ema.update(bucket)
        self._set_scales(shared)

    def accumulate_gradients(self) -> Mapping[int, Handle | None]:
        """All but the update: the mean gradient over micro-batches and ranks, and the loss.

        Returns the exchange under way of every bucket, by where it begins; None where there is
        nothing to wait for.
        """
        self._exchange.begin()
        losses: list[Tensor] = []
        for micro_step, inputs in enumerate(self.batches.inputs):
            last = micro_step == self.accumulate - 1
            self._exchange.begin_backward(add=micro_step > 0, reduce=last)
            samples = inputs.moments, inputs.context, inputs.sample_indices
            loss = self.diffusion(self.unet, *samples)
            # Sums over micro-batches and ranks become means; on powers of two this is exact.
            loss.backward(self._share)
            self._exchange.end_backward()
            losses.append(loss.detach())
        total = sum(losses[1:], losses[0])
        self._poison.add_(total, alpha=0)  # infinity x 0 is NaN, and NaN stays
        torch.add(self._poison, total, alpha=1 / self.accumulate, out=self.loss)
        return self._exchange.handles

    def _share_magnitudes(self) -> Handle | None:
        """Begin to reduce the magnitudes that FP8 layers recorded, for ranks to agree on scales."""
        amax = amax_buffer(self.unet)
        return None if amax is None else self.strategy.largest(amax)

    def _set_scales(self, shared: Handle | None) -> None:
        """Set the next step's delayed FP8 scales, where there are such."""
        if shared:
            shared.wait()
        update_scales(self.unet)

    def gather_weights(self) -> None:
        """Fill all weights from the shares of all ranks now; all must call it."""
        for bucket in self.flat.buckets:
            if handle := self.strategy.gather(self.flat.weights[bucket.all]):
                handle.wait()

    def rehearse(self, passes: int) -> None:
        """Everything once or more, with weights and moments as they were at the end.

        Kernels are compiled, convolutions tuned, workspaces and communicators made. The precision
        state and the loss change; gradients are scratch.
        """
        for _ in range(passes):
            for handle in self.accumulate_gradients().values():
                if handle:
                    handle.wait()
            self._set_scales(self._share_magnitudes())
        self.optimizer.try_on_scratch()
        if self.ema:
            self.ema.try_on_scratch()
        self.loss.zero_()
        self._poison.zero_()
