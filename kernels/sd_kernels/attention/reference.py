"""Multi-head attention in plain torch.

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

import torch


def attention(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for each head, without mask or dropout: (B, L, H*D).

    Self-attention: qkv (B, L, 3*H*D) is q | k | v, the output of one linear layer of concatenated
    weights. Cross-attention: `qkv` is the queries (B, L, H*D), and kv (B, T, 2*H*D) is k | v. Any
    floating dtype; the softmax is computed in float32 at least. Vaswani et al., "Attention Is All
    You Need" (2017), section 3.2.
    """
    q, k, v = qkv.chunk(3, dim=-1) if kv is None else (qkv, *kv.chunk(2, dim=-1))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
