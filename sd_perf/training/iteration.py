"""The whole training iteration of the fast network, as a CUDA graph can capture it.

It reads its inputs, learning rate and step number from tensors that stay where they are, never asks
the device for a number, and changes weights, moments and precision state in place.
docs/training_step.md tells what is in it and what is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_perf.config import Config
from sd_perf.distributed.strategies import Handle, build_strategy
from sd_perf.distributed.world import World
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.fast.unet import FastUNet
from sd_perf.training.flat import Bucket, FlatParameters
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
        self.strategy = build_strategy(training.strategy, world)
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
        self.diffusion = FusedDiffusionStep(config, seed, ops).to(world.device)
        self.batches = StaticBatches(config, world)
        self.loss = torch.zeros((), device=world.device)
        self._poison = torch.zeros((), device=world.device)
        self._exchange = _Exchange(self) if world.size > 1 else None
        if self._exchange:
            self._exchange.watch(uses)

    def __call__(self) -> None:
        """Forward, backward, exchange and update; see the class."""
        handles = self.accumulate_gradients()
        for bucket in reversed(self.flat.buckets):
            if handle := handles.get(bucket.begin):
                handle.wait()
            self.optimizer.step(bucket)

    def accumulate_gradients(self) -> Mapping[int, Handle]:
        """All but the update: the mean gradient over micro-batches and ranks, and the loss.

        Returns the exchanges under way, by where their buckets begin.
        """
        if self._exchange:
            self._exchange.begin()
        mean = torch.zeros_like(self.loss)
        for micro_step, inputs in enumerate(self.batches.inputs):
            add = micro_step > 0
            is_last = micro_step == self.accumulate - 1
            if self._exchange:
                self._exchange.begin_backward(add=add, reduce=is_last)
            samples = inputs.moments, inputs.context, inputs.sample_indices
            loss = self.diffusion(self.unet, *samples) / self.accumulate
            # Sums over ranks become means; on powers of two this is exact.
            (loss / self.world.size).backward()
            mean += loss.detach()
            if not self._exchange:
                for bucket in self.flat.buckets:
                    self.flat.collect(bucket, add=add)
        self._poison += 0 * mean  # infinity x 0 is NaN, and NaN stays
        self.loss.copy_(mean + self._poison)
        return self._exchange.handles if self._exchange else {}

    def rehearse(self, passes: int) -> None:
        """Everything once or more, with weights and moments as they were at the end.

        Kernels are compiled, convolutions tuned, workspaces and communicators made. The precision
        state and the loss change; gradients are scratch.
        """
        for _ in range(passes):
            for handle in self.accumulate_gradients().values():
                handle.wait()
        self.optimizer.try_on_scratch()
        self.loss.zero_()
        self._poison.zero_()


class _Exchange:
    """Exchanges buckets among ranks, beside the computation.

    A bucket's weights are gathered before their first use in the forward pass; its gradients are
    reduced as soon as the backward pass has made the last of them. Buckets go out in one order on
    all ranks, from the last to the first.
    """

    def __init__(self, iteration: Iteration) -> None:
        self.flat, self.strategy = iteration.flat, iteration.strategy
        self.handles: dict[int, Handle] = {}
        """reductions of this iteration, by the bucket's begin"""
        self._gathers: dict[int, Handle] = {}
        self._missing: dict[int, int] = {}
        self._add = self._reduce = False
        self._sent = 0

    def watch(self, uses: list[tuple[torch.nn.Module, list[str]]]) -> None:
        """Hook every module that `uses` names, and every parameter."""
        of_name = {name: bucket for bucket in self.flat.buckets for name in bucket.names}
        for module, names in uses:
            needed = sorted({of_name[name].begin for name in names})
            module.register_forward_pre_hook(partial(self._before_use, needed))
        for name, parameter in self.flat.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._after, of_name[name]))

    def begin(self) -> None:
        """Begin to gather all weights, in the order of their use."""
        self.handles = {}
        self._gathers = {
            bucket.begin: handle
            for bucket in self.flat.buckets
            if (handle := self.strategy.gather(self.flat.weights[bucket.all]))
        }

    def begin_backward(self, *, add: bool, reduce: bool) -> None:
        """Expect the gradients of a micro-batch: add them to what is there, reduce the sums."""
        self._add, self._reduce, self._sent = add, reduce, 0
        self._missing = {bucket.begin: len(bucket.names) for bucket in self.flat.buckets}

    def _before_use(self, needed: list[int], *_: Any) -> None:
        for begin in needed:
            if handle := self._gathers.pop(begin, None):
                handle.wait()

    def _after(self, bucket: Bucket, _: Tensor) -> None:
        self._missing[bucket.begin] -= 1
        in_order = self.flat.buckets[::-1]
        while self._sent < len(in_order) and not self._missing[in_order[self._sent].begin]:
            self._send(in_order[self._sent])
            self._sent += 1

    def _send(self, bucket: Bucket) -> None:
        self.flat.collect(bucket, add=self._add)
        if self._reduce and (handle := self.strategy.reduce(self.flat.grads[bucket.all])):
            self.handles[bucket.begin] = handle
