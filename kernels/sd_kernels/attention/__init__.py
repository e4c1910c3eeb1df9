"""Self-attention of packed q | k | v, and cross-attention with packed k | v.

Heads of 64 channels, no mask, no dropout.

Order of preference by published TFLOP/s on an H100 at head dim 64, forward and backward, 4096
tokens (FlashAttention 2: 321, 279; cuDNN: 408, 417; FlashAttention 3: 476, 453), then by what
packing the gradient costs. FlashAttention 2 and Transformer Engine run only when named:
`flash_sdpa` has the former's kernels, `cudnn` and `cudnn_graph` the latter's. A deterministic run
takes `cudnn_graph`, or where that is not installed `flash_sdpa`, which torch makes deterministic.

| backend | passes over the packed gradient besides the kernel's own |
|---|---|
| fa2, fa4, te, cudnn_graph | none: written into its slices |
| fa3 | none; of a context's k and v one (77 rows) |
| cudnn, flash_sdpa, efficient, math | one `stack`, which reads and writes it |

Shape letters: B samples, L queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from sd_kernels.reasons import Reason, refusal
from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, transformers
from sd_kernels.spec import Attention, Backend, Case, Draw, Inputs, OpSpec, Work, counted

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Extras:
    """Whether keys and values come from the text, packed by themselves."""

    cross: bool


def _make(name: str, B: int, L: int, T: int, H: int, D: int = SD_V2.head_dim, **draw: Any) -> Case:
    """Self-attention where T is 0."""
    return Case(
        name,
        {"B": B, "L": L, "T": T or L, "H": H, "D": D},
        {"num_heads": H},
        draw=Draw(**draw),
        extras=Extras(cross=T > 0),
    )


def _calls(unet: Architecture) -> list[tuple[int, int, int, int]]:
    """(queries, keys or 0 for self-attention, heads, head dim) of every attention."""
    sizes = [(layer.side**2, layer.channels // unet.head_dim) for layer in transformers(unet)]
    return [(L, T, H, unet.head_dim) for (L, H), T in product(sizes, (0, unet.context_length))]


def _case(call: tuple[int, int, int, int]) -> Case:
    tokens, keys, heads, _ = call
    return _make(f"{tokens} tokens, {heads} heads, {'cross' if keys else 'self'}", BATCH, *call)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, L, T, H, D = case.sizes("B", "L", "T", "H", "D")
    if not case.extras.cross:
        return {"qkv": make.data(B, L, 3 * H * D), "kv": None, **case.options}
    return {"qkv": make.data(B, L, H * D), "kv": make.data(B, T, 2 * H * D), **case.options}


def _work(case: Case, dtype: torch.dtype) -> Work:
    """Two matmuls forward; five backward, one of which computes the scores again.

    The float32 sums of the rows of scores are not counted.
    """
    B, L, T, H, D = case.sizes("B", "L", "T", "H", "D")
    forward, queries, keys = (
        4.0 * B * H * L * T * D,
        B * L * H * D * dtype.itemsize,
        B * T * H * D * dtype.itemsize,
    )
    return Work(
        forward, 2 * queries + 2 * keys, 4 * queries + 4 * keys, backward_flops=2.5 * forward
    )


def _head_dims(most: int, single_key: bool = True) -> Callable[[Case, torch.dtype], Reason | None]:
    def refuses(case: Case, dtype: torch.dtype) -> Reason | None:
        T, D = case.sizes("T", "D")
        if D % 8 or most < D:
            return refusal(f"takes head dims that are multiples of 8 up to {most}", str(D))
        return None if single_key or T > 1 else refusal("takes no single key")

    return refuses


def _sixteen_bytes(case: Case, dtype: torch.dtype) -> Reason | None:
    D = case.shape["D"]
    is_whole = D * dtype.itemsize % 16 == 0
    return None if is_whole else refusal("takes head dims of whole 16 bytes", f"{D} of {dtype}")


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Queries, keys, values and the output, and a float32 for each row of scores."""
    B, L, T, H, D = case.sizes("B", "L", "T", "H", "D")
    return B * H * (2 * D * (L + T) * dtype.itemsize + 4 * L)


def _flash(name: str, *, most: int, **fields: Any) -> Backend:
    """A backend in `flash`, for head dims up to `most`; `fields` are those of `Backend`."""
    refuses = _head_dims(most)
    return Backend(
        name,
        f"{__name__}.flash",
        attribute=name,
        gpu_dtypes=HALF,
        refuses=refuses,
        deterministic=False,  # their backward adds up dq by atomics unless told not to
        **fields,
    )


def _sdpa(name: str, attribute: str, **limits: Any) -> Backend:
    """A backend in `aten`: one of torch's kernels of scaled_dot_product_attention."""
    return Backend(name, f"{__name__}.aten", attribute=attribute, **limits)


SPEC = OpSpec(
    name="attention",
    summary="softmax(q k^T / sqrt(D)) v from packed q | k | v",
    backends=(
        _flash(
            "fa3",
            most=256,
            requires="flash_attn_interface",
            package="flash-attn-3 at 01afd16d",
            install="build hopper/ of github.com/Dao-AILab/flash-attention",
            capability=(9, 0),
            majors=(9,),
        ),
        _flash(
            "fa4",
            most=128,
            requires="flash_attn.cute",
            package="flash-attn-4 4.0.0b36",
            install="pip install flash-attn-4==4.0.0b36",
            capability=(9, 0),
            majors=(9, 10),
        ),
        Backend(
            "cudnn_graph",
            f"{__name__}.cudnn_graph",
            requires="cudnn",
            package="nvidia-cudnn-frontend 1.32.0",
            install="pip install 'sd-perf[cudnn]'",
            capability=(8, 0),
            gpu_dtypes=HALF,
            refuses=_head_dims(128, single_key=False),
        ),
        _sdpa(
            "cudnn",
            "cudnn",
            capability=(8, 0),
            gpu_dtypes=HALF,
            refuses=_head_dims(128, single_key=False),
            deterministic=False,  # torch refuses it in a deterministic run
        ),
        _sdpa("flash_sdpa", "flash", gpu_dtypes=HALF, refuses=_head_dims(256)),
        _sdpa("efficient", "efficient", capability=(8, 0), refuses=_sixteen_bytes),
        _sdpa("math", "math"),
        _flash(
            "fa2",
            most=256,
            requires="flash_attn.flash_attn_interface",
            package="flash-attn 2.8.3.post2",
            install="pip install --no-build-isolation flash-attn==2.8.3.post2",
            capability=(8, 0),
            automatic=False,
        ),
        Backend(
            "te",
            f"{__name__}.te",
            package="transformer_engine 2.20.2",
            install="pip install --no-build-isolation 'transformer_engine[pytorch]==2.20.2'",
            capability=(8, 0),
            gpu_dtypes=HALF,
            refuses=_head_dims(128),
            automatic=False,
            deterministic=False,
        ),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    # No single keys, and no means far from 0. There a gradient is the small difference of large
    # terms, one of which flash attention computes from the rounded output: its error is then up to
    # four times plain torch's.
    small_cases=(
        _make("tiny, cross", 1, 7, 9, 2, 16),
        _make("self, 5 heads", 2, 37, 0, 5),
        _make("cross, 77 keys", 2, 33, 77, 5),
        _make("self, rows apart", 2, 16, 0, 3, padding=16),
        _make("tiny, self", 1, 3, 0, 2, 8),
        _make("cross, rows apart", 2, 9, 77, 2, padding=16),
        _make("one token", 2, 1, 0, 2),
        _make("one query", 2, 1, 77, 1),
        _make("one head", 1, 129, 0, 1),
        _make("other head dim", 2, 10, 0, 2, 40),
        _make("shifted mean", 2, 24, 77, 2, mean=-0.5),
        _make("large scores", 2, 24, 0, 2, std=3.0),
    ),
    inputs=_inputs,
    work=_work,
    family="attention",
    matmuls=lambda case: Attention(queries=case.shape["L"]),
    saved_bytes=_saved_bytes,
)
