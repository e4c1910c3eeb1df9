"""Attention by Transformer Engine's DotProductAttention (transformer_engine 2.20.2), on cuDNN.

The fastest published runs of the benchmark use it. It recognises packed tensors by the addresses of
q, k and v, and reads them as dense ones whatever their strides, so tensors with rows apart are
copied here first. Its own packed arguments (`qkv_layer`, `kv_layer`) select q, k and v, whose
gradients autograd pads with zeros and adds up. Here q, k and v are views, and their gradients,
which it writes side by side, are taken as they lie. FP8 attention is off: its backward needs a head
dim of 128 on Hopper. Never run on hardware by this project.

Shape letters: B samples, L tokens, H heads, D head dim.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

# cuDNN or an error: otherwise it takes the first kernel that it finds, down to unfused matmuls. The
# variables are read when it is imported.
os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}

import transformer_engine.pytorch as te

from sd_kernels.attention.packing import packed


@cache
def _module(num_heads: int, head_dim: int, attention_type: str) -> Any:
    return te.DotProductAttention(
        num_heads,
        head_dim,
        qkv_format="bshd",
        attn_mask_type="no_mask",  # the default is causal
        attention_type=attention_type,
        softmax_scale=head_dim**-0.5,
    )


class _Unbind(torch.autograd.Function):
    """The parts (B, L, H, D) of x (B, L, parts, H, D).

    Backward copies nothing where the gradients lie in memory as the parts do.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.unbind(2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (B, L, H, D), parts = grads[0].shape, len(grads)
        strides = L * parts * H * D, parts * H * D, D, 1
        start, storage = grads[0].storage_offset(), grads[0].untyped_storage().data_ptr()
        for i, grad in enumerate(grads):
            here = grad.untyped_storage().data_ptr(), grad.storage_offset(), grad.stride()
            if here != (storage, start + i * H * D, strides):
                return torch.stack(grads, 2)
        return grads[0].as_strided((B, L, parts, H, D), (*strides[:2], H * D, *strides[2:]))


def attention(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """See `reference.attention`."""
    first, second = packed("attention (te)", qkv, kv, num_heads)
    if second is None:
        q, k, v = _Unbind.apply(first.contiguous())
    else:
        q, (k, v) = first.contiguous(), _Unbind.apply(second.contiguous())
    with te.autocast(enabled=False):
        return _module(num_heads, q.shape[-1], "self" if kv is None else "cross")(q, k, v)
