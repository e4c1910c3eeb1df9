"""Views of packed q | k | v as heads, without copies, and the checks of these inputs.

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

import torch

from sd_kernels.errors import require


def packed(
    op: str, qkv: torch.Tensor, kv: torch.Tensor | None, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views: qkv (B, L, 3, H, D) and None, or q (B, L, H, D) and kv (B, T, 2, H, D).

    Rows may be apart. Raises KernelError, which names `op`, unless shapes and dtypes fit.
    """
    tensors = [qkv] if kv is None else [qkv, kv]
    for x in tensors:
        require(x.dim() == 3, op, f"shape {tuple(x.shape)}", "(B, L, channels)")
        require(x.is_floating_point(), op, str(x.dtype), "a floating dtype")
        require(x.numel() > 0, op, f"the empty shape {tuple(x.shape)}", "at least one element")
        require(x.device == qkv.device, op, f"{qkv.device} and {x.device}", "one device")
        require(x.dtype == qkv.dtype, op, f"{qkv.dtype} and {x.dtype}", "one dtype")
    parts = 3 if kv is None else 1
    whole = num_heads > 0 and qkv.shape[-1] % (parts * num_heads) == 0
    require(
        whole,
        op,
        f"{qkv.shape[-1]} channels of {num_heads} heads",
        f"a multiple of {parts} * heads",
    )
    if kv is None:
        return _rows(qkv).unflatten(-1, (3, num_heads, -1)), None
    twice = kv.shape[0] == qkv.shape[0] and kv.shape[-1] == 2 * qkv.shape[-1]
    wanted = f"kv ({qkv.shape[0]}, T, {2 * qkv.shape[-1]})"
    require(twice, op, f"kv of shape {tuple(kv.shape)} for queries of {tuple(qkv.shape)}", wanted)
    return _rows(qkv).unflatten(-1, (num_heads, -1)), _rows(kv).unflatten(-1, (2, num_heads, -1))


def separate(
    op: str, qkv: torch.Tensor, kv: torch.Tensor | None, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q (B, L, H, D), k and v (B, T, H, D). One `stack` packs their gradients.

    They come from `unbind`: for three selections autograd would pad each gradient with zeros and
    add them up.
    """
    first, second = packed(op, qkv, kv, num_heads)
    if second is None:
        q, k, v = first.unbind(2)
    else:
        q, (k, v) = first, second.unbind(2)
    return q, k, v


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
