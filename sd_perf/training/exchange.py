"""How the gradients of a backward pass come into the flat buffer, and from there to other ranks.

Shape letters: M rows, K columns in and N columns out of a matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_perf.distributed.strategies import Handle, Strategy
from sd_perf.training.flat import Bucket, FlatParameters


class Exchange:
    """Collects gradients bucket by bucket, and exchanges them among ranks beside the computation.

    A bucket's weights are gathered before their first use in the forward pass; its gradients are
    collected and reduced as soon as the backward pass has made the last of them. Buckets go out in
    one order on all ranks, from the last to the first.

    The gradient of a weight that one matmul makes is written into the flat buffer by that matmul
    (`sd_kernels.weight_gradient`), where the two have one dtype. All others are moved there.
    """

    def __init__(
        self,
        flat: FlatParameters,
        strategy: Strategy,
        uses: list[tuple[torch.nn.Module, list[str]]],
    ) -> None:
        """Hooks every module that `uses` names where weights are gathered, and every parameter of
        several buckets."""
        self.flat, self.strategy = flat, strategy
        self.handles: dict[int, Handle | None] = {}
        """reductions of this iteration, by the bucket's begin"""
        self._gathers: dict[int, Handle] = {}
        self._missing: dict[int, set[str]] = {}
        self._written: set[str] = set()
        """parameters whose gradients this backward pass has written into the buffer itself"""
        self._add = self._reduce = False
        self._bucket_of = {name: bucket for bucket in flat.buckets for name in bucket.names}
        if strategy.divides_state:
            for module, names in uses:
                needed = sorted({self._bucket_of[name].begin for name in names})
                module.register_forward_pre_hook(partial(self._before_use, needed))
        if len(flat.buckets) > 1:
            for name, parameter in flat.parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._after, name))
        if flat.grads.dtype == flat.weights.dtype:
            for name, gradient in flat.views(flat.grads).items():
                # (N, K), or (N, K, 1, 1).
                if gradient.dim() > 1 and gradient.shape[2:].numel() == 1:
                    weight: Any = flat.parameters[name]
                    weight.gradient_sink = WeightSink(self, (name,), gradient.flatten(1))

    def begin(self) -> None:
        """Begin to gather all weights, in the order of their use."""
        self._gathers = {
            bucket.begin: handle
            for bucket in self.flat.buckets
            if (handle := self.strategy.gather(self.flat.weights[bucket.all]))
        }

    def begin_backward(self, *, add: bool, reduce: bool) -> None:
        """Expect the gradients of a micro-batch: add them to what is there, reduce the sums."""
        self._add, self._reduce, self.handles = add, reduce, {}
        self._missing = {bucket.begin: set(bucket.names) for bucket in self.flat.buckets}
        self._written = set()

    def end_backward(self) -> None:
        """Collect what is left: all, where there is one bucket and nothing to do meanwhile.

        RuntimeError where a parameter took no part in the loss: its gradient is an old one.
        """
        for bucket in reversed(self.flat.buckets):
            if bucket.begin not in self.handles:
                self._send(bucket)

    def _before_use(self, needed: list[int], *_: Any) -> None:
        for begin in needed:
            if handle := self._gathers.pop(begin, None):
                handle.wait()

    def write(self, gradient: Tensor, names: Sequence[str], dy: Tensor, x: Tensor) -> None:
        """Take dy (M, N) transposed times x (M, K) as the `gradient` (N, K) of these parameters.

        `gradient` is a view of the flat buffer.
        """
        if not self._written.isdisjoint(names):
            raise RuntimeError(f"{', '.join(names)}: used twice, so that a sink cannot take it")
        if self._add:
            gradient.addmm_(dy.t(), x)
        else:
            torch.mm(dy.t(), x, out=gradient)
        self._written.update(names)
        if len(self.flat.buckets) > 1:
            for name in names:
                self._after(name)

    def _after(self, name: str, _: Tensor | None = None) -> None:
        # torch may call the hook of a parameter without a gradient, too, after `write`.
        self._missing[self._bucket_of[name].begin].discard(name)
        for each in reversed(self.flat.buckets):
            if self._missing[each.begin]:
                break
            if each.begin not in self.handles:
                self._send(each)

    def _send(self, bucket: Bucket) -> None:
        self.flat.collect(bucket, add=self._add, besides=self._written)
        gradients = self.flat.grads[bucket.all]
        self.handles[bucket.begin] = self.strategy.reduce(gradients) if self._reduce else None


class WeightSink:
    """Where the gradient (N, K) of a weight lies, or of weights that are rows of one."""

    def __init__(self, exchange: Exchange, names: Sequence[str], gradient: Tensor) -> None:
        self.exchange, self.names, self.gradient = exchange, names, gradient

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """See `Exchange.write`."""
        self.exchange.write(self.gradient, self.names, dy, x)

    def joined(self, parts: Sequence[WeightSink]) -> WeightSink:
        """The sink of all parts' rows; this one is the first, and they lie one behind the other."""
        names = [name for part in parts for name in part.names]
        rows = sum(len(part.gradient) for part in parts)
        size = rows, self.gradient.shape[1]
        return WeightSink(
            self.exchange, names, self.gradient.as_strided(size, self.gradient.stride())
        )
