"""What the UNet is trained on: draws, latents from the autoencoder's moments, noising, target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work

OPTIONS = {
    "seed": 1,
    "latent_scale": 0.18215,
    "timestep_stream": 0,
    "noise_stream": 1,
    "moments_stream": 2,
    "prediction": "v",
}


@dataclass(frozen=True)
class Extras:
    """Dtype of the moments, and how large the indices of samples may be."""

    moments: torch.dtype = torch.float32
    samples: int = 2**20


USUAL = Extras()


def latents(unet: Architecture) -> tuple[Case, ...]:
    """The one call of a step, on latents (B, C, H, W)."""
    side = unet.side
    shape = {"B": BATCH, "C": unet.in_channels, "H": side, "W": side}
    return (Case(f"{side} x {side} latents", shape, options=OPTIONS, extras=USUAL),)


def _small(
    name: str,
    B: int,
    H: int,
    W: int,
    C: int = 4,
    seed: int = 1,
    prediction: str = "v",
    extras: Extras = USUAL,
    **draw: Any,
) -> Case:
    shape, options = (
        {"B": B, "C": C, "H": H, "W": W},
        {**OPTIONS, "seed": seed, "prediction": prediction},
    )
    return Case(name, shape, options, Draw(**draw), extras)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    """Means are drawn around 0, log-variances as the case says.

    The schedule has 1000 steps, but not the benchmark's values: an op must not know those.
    """
    B, C, H, W = case.sizes("B", "C", "H", "W")
    moments = torch.cat((make.tensor(B, C, H, W), make.data(B, C, H, W)), dim=1).detach()
    alphas_cumprod = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64, device=make.device)
    return {
        "moments": moments.to(case.extras.moments),
        "sample_indices": make.integers(0, case.extras.samples, B),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt().float(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt().float(),
        "dtype": make.dtype,
        **case.options,
    }


def _work(case: Case, dtype: torch.dtype) -> Work:
    numbers = case.shape["B"] * case.shape["C"] * case.shape["H"] * case.shape["W"]
    return Work(0.0, numbers * (2 * 4 + dtype.itemsize + 4), 0.0)


SPEC = OpSpec(
    name="diffusion_inputs",
    summary="draws, latents from moments, noising and target",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=latents(SD_V2),
    cases_of=latents,
    small_cases=(
        _small("tiny", 1, 2, 2),
        _small("ragged", 3, 5, 60, extras=Extras(samples=2**62), seed=2**64 - 3),
        _small("large log-variances", 2, 8, 8, std=20.0),
        _small("bfloat16 moments", 2, 16, 16, extras=Extras(torch.bfloat16), mean=-2.3, std=0.5),
        _small("float16 moments", 2, 3, 4, extras=Extras(torch.float16), mean=-2.3, std=0.5),
        _small("eight channels", 2, 6, 6, C=8),
        _small("noise as target", 2, 5, 12, prediction="epsilon"),
    ),
    inputs=_inputs,
    work=_work,
    family="optimizer, inputs, loss",
    outputs=("noisy", "target", "timesteps"),
    exact=("timesteps",),
    differentiable=False,
)
