"""Weight gradients that a matmul writes where the optimizer reads them.

Autograd makes a tensor for every gradient, and training moves it into its buffer, which reads and
writes it once more. A matmul can write there itself. Whoever owns the buffer sets the attribute
`gradient_sink` of a weight; the ops that are one matmul look for it. A tensor made of the weight by
a cast, a copy or `detach` has no such attribute, so its gradient goes the ordinary way.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Sink = Callable[[Tensor, Tensor], None]
"""takes dy (M, N) and x (M, K): dy^T x (N, K) is the weight's gradient, and autograd has none"""


def sink_of(weight: Tensor) -> Sink | None:
    """What takes the weight's gradient in the backward pass to come; None: autograd."""
    # torch.compile would have to trace what the sink does.
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    return getattr(weight, "gradient_sink", None)


def with_sink(y: Tensor, x: Tensor, weight: Tensor, sink: Sink) -> Tensor:
    """y (..., N), computed from x (..., K) and the detached weight; backward calls the sink."""
    return _WithSink.apply(y, x.detach(), weight, sink)


class _WithSink(torch.autograd.Function):
    """The identity. Its place in the graph is where autograd would compute the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.sink(dy.flatten(0, -2), x.flatten(0, -2))
        return dy, None, None, None
