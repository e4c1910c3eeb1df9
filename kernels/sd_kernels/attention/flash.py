"""Attention by FlashAttention 2, 3 and 4.

These are three packages, each of which is imported when its function is called. All take
(B, L, H, D) with rows apart, so forward copies nothing. Backward writes into the slices of one
packed gradient. The exception is FlashAttention 3 with a context: torch packs the gradients of its
k and v (77 rows) in a pass of its own. Never run on hardware by this project.

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

import torch

from sd_kernels.attention.packing import packed, separate
from sd_kernels.attention.registered import registered


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


def _fa4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute import flash_attn_func

    # By keyword: the fourth positional argument is not the scale, as it is in versions 2 and 3.
    return flash_attn_func(q=q, k=k, v=v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)


def _fa4_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> None:
    # The public backward allocates dq, dk, dv apart. It calls this one, which takes them.
    from flash_attn.cute.interface import _flash_attn_bwd

    out, lse, dout, dq, dk, dv = others
    given = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
    _flash_attn_bwd(**given, softmax_scale=q.shape[-1] ** -0.5, dq=dq, dk=dk, dv=dv)


fa4 = registered("fa4", _fa4_forward, _fa4_backward)
"""See `reference.attention`; flash_attn.cute of flash-attn-4 4.0.0b36."""
