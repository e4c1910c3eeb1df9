"""Attention by a library that writes packed gradients, as a pair of registered ops.

torch.compile and the tools that trace a training step need registered ops; the libraries' own
functions are none.

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sd_kernels.attention.packing import packed
from sd_kernels.spec import Function

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""q (B, L, H, D), k and v (B, T, H, D), rows apart -> the output (B, L, H, D) and the log-sum-exp
of each row of scores (B, H, L) float32"""
Backward = Callable[..., None]
"""q, k, v, output, log-sum-exp, the output's gradient, and dq, dk, dv to write, rows apart"""


def registered(name: str, forward: Forward, backward: Backward) -> Function:
    """The op on this library: its ops are sd_kernels::attention_<name>_forward and _backward."""

    @torch.library.custom_op(f"sd_kernels::attention_{name}_forward", mutates_args=())
    def attend(
        first: torch.Tensor, second: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(*_q_k_v(first, second))

    @torch.library.custom_op(f"sd_kernels::attention_{name}_backward", mutates_args=())
    def differentiate(
        first: torch.Tensor,
        second: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
    ) -> list[torch.Tensor]:
        grads = [x.new_empty(x.shape) for x in (first, second) if x is not None]
        slots = _q_k_v(grads[0], None if second is None else grads[1])
        backward(*_q_k_v(first, second), out, lse, dout.contiguous(), *slots)
        return grads

    @attend.register_fake
    def _(first: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        B, L, H, D = first.shape[0], first.shape[1], *first.shape[-2:]
        return first.new_empty(B, L, H, D), first.new_empty(B, H, L, dtype=torch.float32)

    @differentiate.register_fake
    def _(first: Any, second: Any, out: Any, lse: Any, dout: Any) -> list[torch.Tensor]:
        return [x.new_empty(x.shape) for x in (first, second) if x is not None]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)  # lse has no gradient

    def differentiated(ctx: Any, dout: torch.Tensor, dlse: Any) -> tuple[Any, ...]:
        grads = differentiate(*ctx.saved_tensors, dout)
        return (*grads, None)[:2]

    attend.register_autograd(differentiated, setup_context=save)

    def attention(
        qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int
    ) -> torch.Tensor:
        """See `reference.attention`."""
        return attend(*packed(f"attention ({name})", qkv, kv, num_heads))[0].flatten(2)

    return attention


def _q_k_v(first: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return first.unbind(2) if second is None else (first, *second.unbind(2))
