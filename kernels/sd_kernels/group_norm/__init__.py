"""Group normalisation with SiLU, and the additions and concatenation before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sd_kernels.reasons import Reason, refusal
from sd_kernels.sd_v2_shapes import (
    BATCH,
    SD_V2,
    Architecture,
    Resample,
    ResBlock,
    Transformer,
    layers,
)
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """What is added to x before it is normalised: a shift of all samples or of each, a residual."""

    bias: bool = False
    shift: bool = False
    residual: bool = False

    def __str__(self) -> str:
        named = [name for name in ("bias", "shift", "residual") if getattr(self, name)]
        return " and ".join(named) or "nothing"


NOTHING, BIAS, SHIFT, RESIDUAL = (
    Extras(),
    Extras(bias=True),
    Extras(shift=True),
    Extras(residual=True),
)
BOTH, SHIFT_RESIDUAL = Extras(bias=True, residual=True), Extras(shift=True, residual=True)


@dataclass(frozen=True)
class _Call:
    side: int
    sources: tuple[int, ...]
    added: Extras
    num_groups: int
    eps: float
    silu: bool
    return_sum: int


def _calls(unet: Architecture) -> list[_Call]:
    """Norms from input to output, each adding what the layer before it left pending.

    A layer leaves its bias and every block its residual to the norm that reads them. The sum is
    read again by the block itself, and on the way down once more, as a skip.
    """

    def of_block(side: int, sources: tuple[int, ...], added: Extras, return_sum: int) -> _Call:
        return _Call(side, sources, added, unet.block_groups, 1e-5, True, return_sum)

    calls, added = [], BIAS
    for layer in layers(unet):
        if isinstance(layer, ResBlock):
            return_sum = 2 if len(layer.sources) == 1 else 1
            calls.append(of_block(layer.side, layer.sources, added, return_sum))
            calls.append(of_block(layer.side, (layer.channels,), SHIFT, 0))
        elif isinstance(layer, Transformer):
            call = layer.side, (layer.channels,), added, unet.transformer_groups, 1e-6
            calls.append(_Call(*call, silu=False, return_sum=1))
        added = BIAS if isinstance(layer, Resample) else BOTH
    calls.append(of_block(unet.side, (unet.widths[0],), added, 0))
    return calls


def _case(call: _Call) -> Case:
    options = {
        "num_groups": call.num_groups,
        "eps": call.eps,
        "silu": call.silu,
        "return_sum": call.return_sum,
    }
    channels = "+".join(map(str, call.sources))
    name = f"{call.side}x{call.side}x{channels} in {call.num_groups}, adds {call.added}"
    return _make(
        name + ("", ", returns the sum", ", returns the sum twice")[call.return_sum],
        BATCH,
        call.side,
        call.side,
        call.sources,
        call.added,
        options,
    )


def _make(
    name: str,
    B: int,
    H: int,
    W: int,
    sources: tuple[int, ...],
    added: Extras,
    options: dict[str, Any],
    **draw: Any,
) -> Case:
    shape = {"B": B, "H": H, "W": W, "C1": sources[0], "C2": sum(sources[1:])}
    return Case(name, shape, options, Draw(**draw), added)


def _small(
    name: str,
    B: int,
    H: int,
    W: int,
    sources: tuple[int, ...],
    added: Extras = NOTHING,
    G: int = 16,
    return_sum: int = 0,
    silu: bool = True,
    **draw: Any,
) -> Case:
    options = {
        "num_groups": G,
        "eps": 1e-5,
        "silu": silu,
        "return_sum": return_sum,
    }
    return _make(name, B, H, W, sources, added, options, **draw)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, H, W, C1, C2 = case.sizes("B", "H", "W", "C1", "C2")
    added = case.extras
    shift = make.tensor(C1, std=0.5) if added.bias else None
    shift = make.tensor(B, C1, std=0.5) if added.shift else shift
    return {
        "x": make.image(B, C1, H, W),
        "weight": make.tensor(C1 + C2, mean=1.0, std=0.3),
        "bias": make.tensor(C1 + C2, std=0.3),
        "shift": shift,
        "residual": make.image(B, C1, H, W) if added.residual else None,
        "skip": make.image(B, C2, H, W) if C2 else None,
        **case.options,
    }


def _work(case: Case, dtype: torch.dtype) -> Work:
    B, H, W, C1, C2 = case.sizes("B", "H", "W", "C1", "C2")
    first, both = (B * H * W * channels * dtype.itemsize for channels in (C1, C1 + C2))
    return_sum = case.options["return_sum"]
    residual_bytes = first if case.extras.residual else 0
    # Backward needs the sum again: what forward returned, or its parts. And it reads the gradient
    # of every later use.
    reads_again = 0 if return_sum else residual_bytes
    return Work(
        0.0,
        forward_bytes=2 * both + residual_bytes + (both if return_sum else 0),
        backward_bytes=(3 + return_sum) * both + reads_again,
    )


def _apex_refuses(case: Case, dtype: torch.dtype) -> Reason | None:
    from sd_kernels.group_norm.apex_limits import refusal as apex_refusal

    C1, C2 = case.sizes("C1", "C2")
    why = apex_refusal(C1 + C2, case.options["num_groups"], dtype)
    return refusal(why) if why else None


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """What is normalised, and the result."""
    B, H, W, C1, C2 = case.sizes("B", "H", "W", "C1", "C2")
    return 2 * B * H * W * (C1 + C2) * dtype.itemsize


SPEC = OpSpec(
    name="group_norm",
    summary="additions, concatenation, group normalisation, SiLU",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend(
            "apex",
            f"{__name__}.apex",
            package="apex 6424da3b",
            install="build Apex from source with APEX_GROUP_NORM=1 "
            "(PyPI's apex is another package)",
            capability=(7, 5),
            refuses=_apex_refuses,
            deterministic=False,  # Apex does not say that it is
        ),
        Backend("torch", f"{__name__}.aten", yardstick=True),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _small("tiny", 1, 2, 1, (32,), BOTH, return_sum=1),
        _small("two sources, groups astride", 2, 3, 5, (320, 640), BOTH, return_sum=1),
        _small("transformer's", 2, 5, 5, (320,), BOTH, G=32, return_sum=1, silu=False),
        _small("shifted mean", 2, 9, 16, (320,), SHIFT, mean=-2.3, std=0.5),
        _small("several tiles", 2, 15, 20, (320,), SHIFT_RESIDUAL, return_sum=2),
        _small("one pixel", 1, 1, 1, (2560,), RESIDUAL),
        _small("2560 channels in 32", 1, 3, 3, (1280, 1280), SHIFT, G=32),
        _small("ragged channels", 3, 7, 3, (48, 80), BOTH, return_sum=2),
        _small("pixels apart", 2, 4, 6, (64,), BOTH, return_sum=2, padding=16),
        _small("nothing added", 2, 4, 4, (96,), G=32, silu=False),
    ),
    inputs=_inputs,
    work=_work,
    family="norms",
    saved_bytes=_saved_bytes,
    outputs=("y", "summed", "summed again"),
)
