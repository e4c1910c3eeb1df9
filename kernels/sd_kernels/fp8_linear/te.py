"""FP8 linear layers of Transformer Engine (transformer_engine.pytorch, signatures of 2.20).

Transformer Engine has no erf-GEGLU (its geglu is the tanh form, gate first) and no LayerNorm that takes a residual, so
what stands before the product is plain torch here. It wants a multiple of 8 rows and of 16 columns; rows are padded
with zeros, which 77 tokens of text need at batches that 8 does not divide. Never run on hardware by this project.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

from sd_kernels.errors import require
from sd_kernels.fp8_linear.checks import check
from sd_kernels.geglu.reference import geglu

HISTORY = 16
"""steps whose largest magnitude delayed scaling looks back on"""


def make_recipe(name: str) -> Any:
    """delayed or current scaling, E4M3 forward and E5M2 for gradients."""
    require(name in ("delayed", "current"), "fp8_linear/te", f"recipe {name!r}", "delayed or current")
    if name == "current":
        return Float8CurrentScaling(fp8_format=Format.HYBRID)
    return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=HISTORY, amax_compute_algo="max")


def padded_rows(rows: int) -> int:
    """The next multiple of 8."""
    return -(-rows // 8) * 8


class Linear(torch.nn.Module):
    """A te.Linear under its recipe; `inner.weight` (N, K) and `inner.bias` (N,) are its parameters."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, recipe: str, dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        super().__init__()
        fits = in_features % 16 == out_features % 16 == 0
        require(fits, "fp8_linear/te", f"{in_features} columns to {out_features}", "multiples of 16")
        self.recipe = make_recipe(recipe)
        self.inner = te.Linear(in_features, out_features, bias=bias, params_dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N). The autocast lies inside, so that a captured graph updates scales too."""
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        with te.autocast(enabled=True, recipe=self.recipe):
            y = self.inner(F.pad(rows, (0, 0, 0, padded_rows(count) - count)))
        return y[:count].view(*x.shape[:-1], -1)


def precision_state(model: torch.nn.Module) -> dict[str, Any]:
    """Scales and histories of every te.Linear by module name: what a checkpoint keeps beside the weights."""
    return {name: layer.get_extra_state() for name, layer in model.named_modules() if isinstance(layer, te.Linear)}


def load_precision_state(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Put back what `precision_state` gave; KernelError where layers differ."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, te.Linear)}
    differing = sorted(layers.keys() ^ state.keys())
    require(not differing, "precision_state", f"layers that differ ({', '.join(differing[:3])})", "the same FP8 layers")
    for name, layer in layers.items():
        layer.set_extra_state(state[name])


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    producer: str = "none",
    eps: float = 1e-5,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `reference.fp8_linear`; current scaling, which has no state, in a layer made for this call.

    The layer's own parameters are on the meta device: the call's stand in for them, and no random number is drawn.
    """
    check(x, weight, bias, residual, norm_weight, norm_bias, producer)
    total = x if residual is None else x + residual
    produced = geglu(total) if producer == "geglu" else total
    if norm_weight is not None:
        produced = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, eps)
    N, K = weight.shape
    layer = Linear(K, N, bias is not None, "current", x.dtype, "meta")
    parameters = {"inner.weight": weight} | ({} if bias is None else {"inner.bias": bias})
    y = torch.func.functional_call(layer, parameters, (produced,))
    return (y, total) if producer == "layer_norm" else y
