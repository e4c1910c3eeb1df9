"""Attention by torch's scaled_dot_product_attention, with each of its kernels pinned by name.

A pinned kernel that cannot run is an error; torch chooses no other. Forward copies nothing: the
kernels read heads where the linear layer wrote them. Backward writes dq, dk and dv apart, and packs
them in one more pass (2 * 3 * B*L*H*D elements moved). That pass stays: torch's backward operators
of cuDNN and FlashAttention return new tensors and take none to write into (no `out` overload), and
`shared_storage_dqdkdv` of the efficient kernel is out of reach of scaled_dot_product_attention.

Shape letters: B samples, L queries, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd_kernels.attention.packing import separate
from sd_kernels.errors import KernelError
from sd_kernels.spec import Function


def _pinned(name: str, kernel: SDPBackend) -> Function:
    """The op on one of torch's kernels; KernelError where that kernel cannot run."""
    op = f"attention ({name})"

    def attention(
        qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int
    ) -> torch.Tensor:
        """See `reference.attention`; gradients may come in any memory order."""
        q, k, v = (x.transpose(1, 2) for x in separate(op, qkv, kv, num_heads))
        try:
            with sdpa_kernel(kernel):
                y = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        except RuntimeError as error:
            # Torch says so where the pinned kernel does not take the inputs; anything else, such as
            # too little memory, is another error.
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            got = f"{q.dtype} queries {tuple(q.shape)}, keys {tuple(k.shape)} on {q.device}"
            raise KernelError(
                f"{op}: got {got}; takes what torch's {kernel.name} kernel takes"
            ) from error
        return y.transpose(1, 2).flatten(2)

    return attention


cudnn = _pinned("cudnn", SDPBackend.CUDNN_ATTENTION)
flash = _pinned("flash_sdpa", SDPBackend.FLASH_ATTENTION)
efficient = _pinned("efficient", SDPBackend.EFFICIENT_ATTENTION)
math = _pinned("math", SDPBackend.MATH)
