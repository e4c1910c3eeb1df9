"""Attention by FlashAttention 2, 3 and 4.

These are three packages, each of which is imported when its function is called. All take
(B, L, H, D) with rows apart, so forward copies nothing. Backward writes into the slices of one
packed gradient. The exception is FlashAttention 3 with a context: torch packs the gradients of its
k and v (77 rows) in a pass of its own. Never run on hardware by this project.

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.attention.packing import packed, separate


def fa2(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """See `reference.attention`; flash-attn 2.8.3, which takes packed q | k | v and k | v."""
    from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

    first, second = packed("attention (fa2)", qkv, kv, num_heads)
    scale = first.shape[-1] ** -0.5
    if second is None:
        return flash_attn_qkvpacked_func(first, softmax_scale=scale).flatten(2)
    return flash_attn_kvpacked_func(first, second, softmax_scale=scale).flatten(2)


def fa3(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """See `reference.attention`; hopper/flash_attn_interface.py, which takes no packed k | v."""
    from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func

    if kv is None:
        first, _ = packed("attention (fa3)", qkv, kv, num_heads)
        return flash_attn_qkvpacked_func(first, softmax_scale=first.shape[-1] ** -0.5).flatten(2)
    q, k, v = separate("attention (fa3)", qkv, kv, num_heads)
    return flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5).flatten(2)


def fa4(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """See `reference.attention`; flash_attn.cute of flash-attn-4 4.0.0b36.

    Its functions are not registered ops, which torch.compile needs; so they are wrapped in two.
    """
    first, second = packed("attention (fa4)", qkv, kv, num_heads)
    return attention_fa4_forward(first, second)[0].flatten(2)


def _q_k_v(first: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return first.unbind(2) if second is None else (first, *second.unbind(2))


@torch.library.custom_op("sd_kernels::attention_fa4_forward", mutates_args=())
def attention_fa4_forward(
    first: torch.Tensor, second: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, L, H, D) and the log-sum-exp of each row of scores (B, H, L) float32."""
    from flash_attn.cute import flash_attn_func

    q, k, v = _q_k_v(first, second)
    # By keyword: the fourth positional argument is not the scale, as it is in versions 2 and 3.
    return flash_attn_func(q=q, k=k, v=v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)


@torch.library.custom_op("sd_kernels::attention_fa4_backward", mutates_args=())
def attention_fa4_backward(
    first: torch.Tensor,
    second: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of `first` and of `second`, if given, in their packed shapes."""
    # The public backward allocates dq, dk, dv apart. It calls this one, which takes them.
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v = _q_k_v(first, second)
    grads = [x.new_empty(x.shape) for x in (first, second) if x is not None]
    dq, dk, dv = _q_k_v(grads[0], None if second is None else grads[1])
    given = {"q": q, "k": k, "v": v, "out": out, "dout": dout.contiguous(), "lse": lse}
    _flash_attn_bwd(**given, softmax_scale=q.shape[-1] ** -0.5, dq=dq, dk=dk, dv=dv)
    return grads


@attention_fa4_forward.register_fake
def _(first: torch.Tensor, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    B, L, H, D = first.shape[0], first.shape[1], *first.shape[-2:]
    return first.new_empty(B, L, H, D), first.new_empty(B, H, L, dtype=torch.float32)


@attention_fa4_backward.register_fake
def _(
    first: torch.Tensor,
    second: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (first, second) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # lse has no gradient


def _backward(ctx: Any, dout: torch.Tensor, dlse: Any) -> tuple[Any, ...]:
    grads = attention_fa4_backward(*ctx.saved_tensors, dout)
    return (*grads, None)[:2]


attention_fa4_forward.register_autograd(_backward, setup_context=_save)
