"""The loss: mean squared error of the v-prediction."""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work


def _cases(unet: Architecture) -> tuple[Case, ...]:
    side = unet.side
    return (
        Case(
            f"{side} x {side} latents", {"B": BATCH, "C": unet.out_channels, "H": side, "W": side}
        ),
    )


def _small(name: str, *shape: int, **draw: Any) -> Case:
    return Case(name, dict(zip("BCHW", shape, strict=True)), draw=Draw(**draw))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, C, H, W = case.sizes("B", "C", "H", "W")
    target = make.tensor(B, H, W, C, dtype=torch.float32).detach().permute(0, 3, 1, 2)
    return {"prediction": make.image(B, C, H, W), "target": target}


def _work(case: Case, dtype: torch.dtype) -> Work:
    numbers = case.shape["B"] * case.shape["C"] * case.shape["H"] * case.shape["W"]
    return Work(0.0, numbers * (dtype.itemsize + 4), numbers * (2 * dtype.itemsize + 4))


SPEC = OpSpec(
    name="v_mse_loss",
    summary="mean squared error and its gradient",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=_cases(SD_V2),
    cases_of=_cases,
    small_cases=(
        _small("tiny", 1, 4, 1, 2),
        _small("ragged", 3, 4, 9, 31),
        _small("one element", 1, 1, 1, 1),
        _small("shifted mean", 2, 4, 16, 16, mean=-2.3, std=0.5),
        _small("many blocks", 5, 4, 33, 37),
        _small("wide", 1, 320, 3, 5),
    ),
    inputs=_inputs,
    work=_work,
    family="optimizer, inputs, loss",
    outputs=("loss",),
)
