"""AdamW: one optimizer step over all parameters in flat buffers, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import bfloat16, dtype, float32, int16, int32, tensor

from sd_kernels.reasons import Reason, refusal
from sd_kernels.sd_v2_shapes import SD_V2, Architecture
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work


@dataclass(frozen=True)
class Extras:
    """Dtypes of the buffers, and the number of the step."""

    weights: dtype | None = None
    """None: the model's, as with grads"""
    grads: dtype | None = None
    exp_avg: dtype = float32
    exp_avg_sq: dtype = float32
    step: int = 7


def _dtypes(case: Case, model: dtype) -> dict[str, dtype]:
    extras = case.extras
    return {
        "weights": extras.weights or model,
        "grads": extras.grads or model,
        "exp_avg": extras.exp_avg,
        "exp_avg_sq": extras.exp_avg_sq,
    }


def _case(name: str, N: int, calls: int = 0, std: float = 1e-3, **extras: Any) -> Case:
    return Case(name, {"N": N}, draw=Draw(std=std), extras=Extras(**extras), calls=calls)


def _cases(unet: Architecture) -> tuple[Case, ...]:
    N = unet.parameters
    return (
        _case("float32 moments", N, calls=1),
        _case("bfloat16 exp_avg", N, exp_avg=bfloat16),
        _case("bfloat16 moments", N, exp_avg=bfloat16, exp_avg_sq=bfloat16),
        _case("float32 gradients", N, grads=float32),
        _case("float32 weights", N, weights=float32),
        _case("float32 alone", N, weights=float32, grads=float32),
    )


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    N, dtypes = case.shape["N"], _dtypes(case, make.dtype)
    std = case.draw.std
    stds = {"weights": 0.05, "grads": std, "exp_avg": std, "exp_avg_sq": std}
    inputs: dict[str, Any] = {
        name: make.tensor(N, dtype=dtypes[name], std=stds[name]).detach() for name in dtypes
    }
    if not make.empty:
        inputs["exp_avg_sq"].square_()
    inputs["remainders"] = (
        make.integers(-(2**15), 2**15, N, dtype=int16) if dtypes["weights"] == bfloat16 else None
    )
    inputs["step"] = tensor(case.extras.step, dtype=int32, device=make.device)
    inputs["learning_rate"] = tensor(1e-4, device=make.device)
    return inputs


def _work(case: Case, model: dtype) -> Work:
    dtypes = _dtypes(case, model)
    # A master takes four bytes either way; gradients are read, all else is read and written. Step
    # and rate: 4 each.
    moved = (
        2 * (4 + dtypes["exp_avg"].itemsize + dtypes["exp_avg_sq"].itemsize)
        + dtypes["grads"].itemsize
    )
    return Work(0.0, case.shape["N"] * moved + 8, 0.0)


def _float32_alone(case: Case, model: dtype) -> Reason | None:
    others = {f"{name} of {kept}" for name, kept in _dtypes(case, model).items() if kept != float32}
    return refusal("takes float32 alone", ", ".join(sorted(others))) if others else None


SPEC = OpSpec(
    name="adamw",
    summary="AdamW on flat buffers, in place",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend(
            "apex",
            f"{__name__}.apex",
            package="apex 004da4ed",
            install=(
                "build NVIDIA's apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (PyPI's apex is another "
                "package)"
            ),
            capability=(8, 0),
            refuses=_float32_alone,
            exact=False,
        ),
        Backend("torch", f"{__name__}.aten", yardstick=True, refuses=_float32_alone, exact=False),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=_cases(SD_V2),
    cases_of=_cases,
    small_cases=(
        _case("tiny", 5),
        _case("one", 1, step=1),
        _case("ragged", 3 * 1024 + 77, step=1),
        _case("bfloat16 moments", 2048 + 3, exp_avg=bfloat16, exp_avg_sq=bfloat16),
        _case("bfloat16 exp_avg", 1024, exp_avg=bfloat16),
        _case("float32 gradients", 1025, grads=float32, step=100_000),
        _case("float32 weights", 1023, weights=float32),
        _case("subnormal squares", 500, std=1e-21),
        _case("large gradients", 500, std=1e15),
    ),
    inputs=_inputs,
    work=_work,
    family="optimizer, inputs, loss",
    outputs=("weights", "exp_avg", "exp_avg_sq", "remainders"),
    dtypes=(bfloat16, float32),
    exact=("weights", "exp_avg", "exp_avg_sq", "remainders"),
    differentiable=False,
    in_place=True,
)
