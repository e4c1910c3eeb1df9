"""FP8 linear layers by Transformer Engine (transformer_engine.pytorch, signatures of 2.20).

Transformer Engine has no GEGLU with erf (its geglu is the tanh form, gate first) and no LayerNorm
that takes a residual, so the producer is plain torch here. It takes multiples of 8 rows and of 16
columns; rows are padded with zeros, which 77 tokens of text need where 8 does not divide the batch.
Never run on hardware by this project.

Shape letters: K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

from sd_kernels.errors import require
from sd_kernels.fp8_linear.checks import check
from sd_kernels.fp8_linear.scaling import HISTORY, Scales
from sd_kernels.geglu.reference import geglu


def make_recipe(name: str) -> Any:
    """The recipe "delayed" or "current", E4M3 forward and E5M2 for gradients; else KernelError."""
    require(
        name in ("delayed", "current"), "fp8_linear/te", f"recipe {name!r}", "delayed or current"
    )
    if name == "current":
        return Float8CurrentScaling(fp8_format=Format.HYBRID)
    return DelayedScaling(
        fp8_format=Format.HYBRID, amax_history_len=HISTORY, amax_compute_algo="max"
    )


def padded_rows(rows: int) -> int:
    """The least multiple of 8 that is not below `rows`."""
    return -(-rows // 8) * 8


class Linear(torch.nn.Module):
    """A te.Linear with its recipe; parameters `inner.weight` (N, K) and `inner.bias` (N,).

    K and N must be multiples of 16, otherwise KernelError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        recipe: str,
        dtype: torch.dtype,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        fits = in_features % 16 == out_features % 16 == 0
        require(
            fits, "fp8_linear/te", f"{in_features} columns to {out_features}", "multiples of 16"
        )
        self.recipe = make_recipe(recipe)
        self.has_state = recipe == "delayed"
        self.inner = te.Linear(
            in_features, out_features, bias=bias, params_dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N).

        Call it within `scaling_step`: outside, delayed scaling takes each call for a whole step.
        """
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        with te.autocast(enabled=True, recipe=self.recipe):
            y = self.inner(F.pad(rows, (0, 0, 0, padded_rows(count) - count)))
        return y[:count].view(*x.shape[:-1], -1)

    def with_weights(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (..., K) to (..., N) with these weights, cast to the dtype of x.

        The layer's own parameters are not read, and may be on the meta device.
        """
        parameters = {"inner.weight": weight} | ({} if bias is None else {"inner.bias": bias})
        cast = {name: parameter.to(x.dtype) for name, parameter in parameters.items()}
        return torch.func.functional_call(self, cast, (x,))


def scaling_step(recipe: str) -> AbstractContextManager[None]:
    """A context for one forward pass of all FP8 layers.

    On leaving the outermost autocast, Transformer Engine moves the histories of all layers on by a
    step, including layers that did not run in it. With one autocast for each of 64 layers, a step
    would push its own magnitudes out of 16 entries before its end.
    """
    return te.autocast(enabled=True, recipe=make_recipe(recipe))


def precision_state(layers: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
    """Scales and histories, as bytes by layer name, of the layers that have any.

    Checkpoints keep them beside the weights.
    """
    return {
        name: layer.inner.get_extra_state() for name, layer in layers.items() if layer.has_state
    }


def load_precision_state(layers: Mapping[str, Linear], state: Mapping[str, torch.Tensor]) -> None:
    """Load what `precision_state` gave into the same memory; KernelError where layers differ."""
    kept = {name: layer.inner for name, layer in layers.items() if layer.has_state}
    differing = sorted(kept.keys() ^ state.keys())
    require(
        not differing,
        "precision_state",
        f"layers that differ ({', '.join(differing[:3])})",
        "the same FP8 layers",
    )
    for name, inner in kept.items():
        inner.set_extra_state(state[name])
        # A layer that had not run has an empty state: set_extra_state loads nothing, and what the
        # layer gathered since must go.
        if state[name].numel() == 0:
            inner.reset_fp8_meta_tensors()


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    inner_weight: torch.Tensor | None = None,
    inner_bias: torch.Tensor | None = None,
    *,
    producer: str = "none",
    eps: float = 1e-5,
    scales: Scales | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `reference.fp8_linear`; current scaling, which has no state, in a layer of this call.

    The layer's own parameters are on the meta device, so that none are drawn; `weight` and `bias`
    take their places.
    """
    norm, inner = (norm_weight, norm_bias), (inner_weight, inner_bias)
    check(x, weight, bias, residual, *norm, *inner, producer, scales)
    got = "delayed scales of this call's own"
    require(scales is None, "fp8_linear/te", got, "None; its layers keep theirs")
    summed = x if residual is None else x + residual
    produced = summed
    if norm_weight is not None:
        produced = F.layer_norm(summed, summed.shape[-1:], norm_weight, norm_bias, eps)
    if inner_weight is not None:
        produced = _layer(produced, inner_weight, inner_bias)
    if producer in ("geglu", "feed_forward"):
        produced = geglu(produced)
    y = _layer(produced, weight, bias)
    return (y, summed) if norm_weight is not None else y


def _layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    N, K = weight.shape
    has_bias = bias is not None
    layer = Linear(K, N, bias=has_bias, recipe="current", dtype=x.dtype, device="meta")
    return layer.with_weights(x, weight, bias)
