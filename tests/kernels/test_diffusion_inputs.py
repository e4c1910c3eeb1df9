from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from sd_kernels import philox
from sd_kernels.diffusion_inputs import OPTIONS, SPEC
from sd_kernels.diffusion_inputs.reference import diffusion_inputs as plain_inputs
from sd_kernels.diffusion_inputs.triton import diffusion_inputs
from sd_kernels.errors import KernelError
from sd_kernels.spec import Inputs
from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.randomness import Stream
from sd_perf.reference.step import DiffusionStep
from tests.kernels.faults import assert_caught, planted

TINY, RAGGED, LARGE, *_ = SPEC.small_cases
INDICES = [5, 0, 2**31, 2**32, 2**32 + 5, 2**40 + 7, 2**62]


def bare(indices: list[int], device: str, logvar: float = 0.0, **options: Any) -> dict[str, Any]:
    """A call that shows its draws: noisy latents are the posterior noise, the target is the noise.

    The tables hold signal 1 and sigma 0, the moments mean 0, and the scale is 1.
    """
    moments = torch.zeros(len(indices), 8, 16, 20, device=device)
    moments[:, 4:] = logvar
    tables = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    names = "moments", "sample_indices", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
    tensors = zip(names, (moments, torch.tensor(indices, device=device), *tables), strict=True)
    return {**dict(tensors), **OPTIONS, "latent_scale": 1.0, "dtype": torch.float32, **options}


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 1, 2**63, 2**64 - 1])
def test_draws_equal_the_oracle(seed: int, device: str) -> None:
    posterior_noise, noise, timesteps = diffusion_inputs(**bare(INDICES, device, seed=seed))
    indices = torch.tensor(INDICES)
    assert torch.equal(timesteps.cpu(), philox.uniform_integers(seed, 0, indices, 1000))
    for ours, stream in ((posterior_noise, 2), (noise, 1)):
        oracle = philox.normal(seed, stream, indices, ours[0].numel()).view(ours.shape)
        # float64 libraries differ in their last bit, which shows where float32 then rounds to the
        # other side: for 1 number in 10^8.
        assert (ours.cpu() != oracle).sum() <= 1
        torch.testing.assert_close(ours.cpu(), oracle, rtol=2.0**-22, atol=1e-12)


def test_any_split_gives_the_same_draws(device: str) -> None:
    case = dataclasses.replace(RAGGED, shape={**RAGGED.shape, "B": 6})
    inputs = SPEC.inputs(case, Inputs(case, torch.float32, device))
    whole = diffusion_inputs(**inputs)
    for rows in ([0, 1], [2, 3, 4, 5], [4, 0, 5, 3, 1, 2]):
        part = {name: inputs[name][rows].contiguous() for name in ("moments", "sample_indices")}
        for ours, all_rows in zip(diffusion_inputs(**{**inputs, **part}), whole, strict=True):
            assert torch.equal(ours, all_rows[rows])


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_the_trainer_s_plain_step_is_the_reference(prediction: Any, device: str) -> None:
    config, seed = DiffusionConfig(prediction=prediction), 7
    step = DiffusionStep(config, seed).to(device)
    case = RAGGED
    inputs = SPEC.inputs(case, Inputs(case, torch.float32, device))
    schedule = step.schedule
    inputs |= {name: getattr(schedule, name) for name in inputs if name.startswith("sqrt_")}
    inputs |= {"seed": seed, "latent_scale": config.latent_scale, "prediction": prediction}
    inputs |= {f"{name.lower()}_stream": Stream[name] for name in ("TIMESTEP", "NOISE", "MOMENTS")}
    latents, noise, timesteps = step.draw(inputs["moments"], inputs["sample_indices"])
    expected = (
        schedule.add_noise(latents, noise, timesteps),
        schedule.target(latents, noise, timesteps),
        timesteps,
    )
    for plain, ours, value in zip(
        plain_inputs(**inputs), diffusion_inputs(**inputs), expected, strict=True
    ):
        assert torch.equal(plain, value)
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_channels_last(dtype: torch.dtype, device: str) -> None:
    noisy, target, _ = diffusion_inputs(**bare([3, 4], device, dtype=dtype))
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in (noisy, target))
    assert (noisy.dtype, target.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("logvar", "clamped", "fault"),
    [(-60.0, -30.0, ("-30.0", "-100.0")), (40.0, 20.0, ("20.0", "100.0"))],
)
def test_log_variances_are_clamped(
    logvar: float, clamped: float, fault: tuple[str, str], device: str
) -> None:
    inputs = bare([1], device, logvar)
    expected = math.exp(0.5 * clamped) * philox.normal(1, 2, torch.tensor([1]), 1280).view(
        1, 4, 16, 20
    )
    latents = diffusion_inputs(**inputs)[0].cpu()
    torch.testing.assert_close(latents, expected, rtol=2e-6, atol=0)
    with planted("diffusion_inputs", fault) as unclamped:
        assert not torch.allclose(unclamped(**inputs)[0].cpu(), expected, rtol=1e-2, atol=0)


def test_moments_that_are_no_numbers_are_seen(device: str) -> None:
    for half in (0, 4):
        inputs = bare([1], device)
        inputs["moments"][0, half, 2, 3] = float("nan")
        noisy = diffusion_inputs(**inputs)[0]
        assert noisy.isnan().sum() == 1
        assert noisy[0, 0, 2, 3].isnan()


SWAPPED_STREAMS = (
    ("blocks, MOMENTS", "blocks, x"),
    ("blocks, NOISE", "blocks, MOMENTS"),
    ("blocks, x", "blocks, NOISE"),
)
SWAPPED_TABLES = (
    ("load(signals", "load(x"),
    ("load(sigmas", "load(signals"),
    ("load(x", "load(sigmas"),
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "fault",
    [
        SWAPPED_STREAMS,
        [("philox(seed, blocks, stream, low, high", "philox(seed, blocks, stream, 0, 0")],
        [("philox(seed, blocks, stream, low, high", "philox(seed, blocks, stream, low, 0")],
        [("(seed + 2**63) % 2**64 - 2**63", "seed % 2**32")],
        [("first // 4", "0")],
        [("normal_2, normal_3 =", "normal_3, normal_2 =")],
        [
            (
                "x, y = tl.where(is_odd, across, along), tl.where(is_odd, along, across)",
                "x, y = across, along",
            )
        ],
        [("(quarter + 1) & 2", "quarter & 2")],
        SWAPPED_TABLES,
        [("tl.exp(0.5 * tl", "tl.exp(1.0 * tl")],
        [("latent_scale * (mean", "1.0 * (mean")],
        [("signal * noise - sigma", "signal * noise + sigma")],
        [("((word.to(tl.uint64) * T) >> 32)", "(word % T)")],
        [("triton.cdiv(H * W, pixels)", "H * W // pixels")],
    ],
    ids=[
        "streams of noise and moments swapped",
        "noise the same for all samples",
        "high word of the index ignored",
        "high word of the seed ignored",
        "noise the same in every tile",
        "numbers out of order",
        "cosine and sine swapped",
        "wrong quarter",
        "tables swapped",
        "log-variance not halved",
        "scale forgotten",
        "wrong sign in v",
        "timestep by remainder",
        "last tile not written",
    ],
)
def test_planted_faults_are_red(fault: list[tuple[str, str]]) -> None:
    assert_caught("diffusion_inputs", RAGGED, *fault)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moments": torch.zeros(1, 8, 16, 20, dtype=torch.int32)}, "int32"),
        ({"moments": torch.zeros(1, 8, 3, 5)}, r"\(1, 8, 3, 5\); takes .* a multiple of 4"),
        ({"moments": torch.zeros(1, 6, 4, 4)}, "C a power of two"),
        ({"moments": torch.zeros(1, 7, 4, 4)}, "C a power of two"),
        ({"moments": torch.zeros(8, 4, 4)}, r"\(B, 2C, H, W\)"),
        ({"moments": torch.zeros(0, 8, 4, 4)}, "empty shape"),
        ({"moments": torch.zeros(1, 4, 4, 8).permute(0, 3, 1, 2)}, "not contiguous"),
        ({"sample_indices": torch.zeros(1, dtype=torch.int32)}, "indices torch.int32"),
        (
            {"sample_indices": torch.zeros(2, dtype=torch.int64)},
            r"\(2,\) on cpu; takes int64 \(1,\)",
        ),
        ({"sqrt_alphas_cumprod": torch.ones(10)}, "tables .* takes two"),
        ({"sqrt_alphas_cumprod": torch.ones(1000).half()}, "float16"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"prediction": "x"}, "prediction 'x'"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        diffusion_inputs(**{**bare([1], "cpu"), **change})
