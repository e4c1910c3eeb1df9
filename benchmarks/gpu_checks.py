"""Correctness before speed: the plain UNet, the draws and the captured iteration, held to budgets on this machine."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_workload import AUTOCAST, FP32, MASTERS, Predictor, Recipe, Workload, channels_last, make_inputs, randomize

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.diffusion.randomness import Stream, normal, philox, uniform_integers
from sd_perf.reference.unet import UNet

Check = dict[str, Any]
"""check, error, budget, passed, note"""

SMALL = UNetConfig(model_channels=64, context_dim=128)
"""the benchmark's network at a fifth of its width, heads of 64 channels still"""
SMALL_LATENTS = 32
CONTEXT_TOKENS = 77

PRECISION_BUDGET = {"plain_fp32": 1e-4, "plain_autocast": 3e-2, "plain_bf16_masters": 3e-2}
"""of ||out - ref|| / ||ref|| against float64. On a CPU the small network has 1.6e-6 in fp32 and 1.3e-2 in bf16; TF32
rounds 8 times finer than bf16, so it would fail as fp32"""
LOSS_BUDGET = {"plain_fp32": 1e-5, "plain_autocast": 1e-3, "plain_bf16_masters": 1e-3}
"""of the relative difference between the losses of replays and of eager iterations"""
UPDATE_BUDGET = {"plain_fp32": 1e-3, "plain_autocast": 0.2, "plain_bf16_masters": 0.2}
"""of the difference between the weights after them, in units of what the iterations changed. Early AdamW steps are
near the sign of the gradient, so rounding that differs from run to run turns whole steps of tiny gradients"""
REPLAYED_ITERATIONS = 3


def make_check(name: str, error: float, budget: float, note: str = "") -> Check:
    """One line of the correctness table. An error that is not finite is kept as None, and never passes."""
    finite = math.isfinite(error)
    return {
        "check": name,
        "error": error if finite else None,
        "budget": budget,
        "passed": finite and error <= budget,
        "note": note,
    }


def passed(checks: Sequence[Check]) -> bool:
    """Whether there are checks and all of them passed."""
    return bool(checks) and all(check["passed"] for check in checks)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float64, both flattened."""
    reference = reference.double()
    return ((out.to(reference.device).double() - reference).norm() / reference.norm()).item()


def differing(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int:
    """How many elements are not equal bit for bit."""
    pairs = zip(tensors, others, strict=True)
    return sum(int((_bits(a) != _bits(b.to(a.device))).sum()) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers: NaN equals NaN, and 0 differs from -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])


def check_draws(device: str) -> list[Check]:
    """Philox words, timesteps and normals of the device against the CPU's, for indices past 2**32."""
    indices = torch.tensor([0, 1, 2**31, 2**40 + 7])
    draws: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "Philox words": lambda index: philox(2**33 + 5, Stream.NOISE, index, 4096),
        "timesteps": lambda index: uniform_integers(5, Stream.TIMESTEP, index, DiffusionConfig().num_timesteps),
        "normals": lambda index: normal(5, Stream.NOISE, index, 4 * 64 * 64),
    }
    checks = []
    for name, draw in draws.items():
        unlike = differing([draw(indices)], [draw(indices.to(device))])
        checks.append(make_check(f"draws: {name}, elements unlike the CPU's", unlike, 0))
    return checks


def _evaluate(
    unet: UNet, recipe: Recipe, inputs: tuple[torch.Tensor, ...], gradients: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and, if asked for, the gradient of sum(output^2) / 2 over all parameters as one vector."""
    parameters = list(unet.parameters())
    with torch.set_grad_enabled(gradients):
        out = Predictor(unet, recipe)(*inputs)
        if not gradients:
            return out, None
        parts = torch.autograd.grad(out, parameters, out.detach())
    return out.detach(), torch.cat([part.double().flatten() for part in parts])


def check_precisions(
    config: UNetConfig,
    latent_size: int,
    recipes: Sequence[Recipe],
    device: str,
    reference_device: str,
    gradients: bool,
) -> list[Check]:
    """Output, and gradients if asked for, of each recipe on the device against float64 on the reference device.

    Weights and inputs are the same float32 values, so the error of a recipe includes its rounding of them.
    """
    with torch.device(reference_device):
        unet = UNet(config)
        randomize(unet, seed=0)
    batch = 2 if gradients else 1
    indices = torch.arange(batch)
    moments, context = make_inputs(config, indices, latent_size, CONTEXT_TOKENS, seed=0)
    latents = moments.chunk(2, dim=1)[0] * DiffusionConfig().latent_scale
    inputs = (latents, 500 + 37 * indices, context)
    exact = dataclasses.replace(FP32, weights=torch.float64)
    reference = copy.deepcopy(unet).double()
    expected, expected_gradient = _evaluate(reference, exact, _moved(inputs, reference_device), gradients)
    del reference

    shape = f"{config.model_channels} channels, {latent_size}x{latent_size}, batch {batch}"
    checks = []
    for recipe in recipes:
        copied = channels_last(copy.deepcopy(unet).to(device, recipe.weights))
        out, gradient = _evaluate(copied, recipe, _moved(inputs, device), gradients)
        name, note = recipe.implementation, f"float64 on {reference_device}; {shape}"
        checks.append(make_check(f"{name}: output", relative_error(out, expected), PRECISION_BUDGET[name], note))
        if gradient is not None and expected_gradient is not None:
            error = relative_error(gradient, expected_gradient)
            checks.append(make_check(f"{name}: gradients", error, PRECISION_BUDGET[name], note))
    return checks


def _moved(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def check_replay(workload: Workload, capture: Callable[[], Callable[[], object]], name: str) -> list[Check]:
    """Eager iterations against replays of the captured one from the same state, and what the capture changed.

    `capture` captures the workload's iteration and returns what replays it; the eager iterations are its warm-up.
    """
    start = [tensor.clone() for tensor in workload.state()]
    losses = _losses(workload, workload.iteration)
    moved = [tensor.clone() for tensor in workload.masters.parameters()]
    workload.reset()
    replay = capture()
    changed = differing(workload.state(), start)
    replayed = _losses(workload, replay)

    first = torch.cat([tensor.flatten() for tensor in start[: len(moved)]])
    update = torch.cat([tensor.flatten() for tensor in moved]) - first
    replayed_update = torch.cat([tensor.detach().flatten() for tensor in workload.masters.parameters()]) - first
    loss_error = ((replayed - losses).abs() / losses.abs()).max().item()
    return [
        make_check(f"{name}: elements of the state unlike the start's after warm-up, reset and capture", changed, 0),
        make_check(f"{name}: losses of replays against eager iterations", loss_error, LOSS_BUDGET[name]),
        make_check(
            f"{name}: weight updates of replays against eager iterations",
            relative_error(replayed_update, update),
            UPDATE_BUDGET[name],
        ),
    ]


def _losses(workload: Workload, call: Callable[[], object]) -> torch.Tensor:
    losses = []
    for _ in range(REPLAYED_ITERATIONS):
        call()
        losses.append(workload.loss.double().cpu())
    return torch.stack(losses)


def check_captures(recipe: Recipe) -> list[Check]:
    """`check_replay` of the small network on the GPU, on a side stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        workload = Workload(recipe, SMALL, batch=4, device="cuda", latent_size=SMALL_LATENTS)
        return check_replay(workload, lambda: workload.capture().replay, recipe.implementation)


def gpu_checks() -> list[tuple[str, Callable[[], list[Check]]]]:
    """Name and function of every group of checks that a GPU goes through before it is timed."""
    recipes = (FP32, AUTOCAST, MASTERS)
    return [
        ("draws", lambda: check_draws("cuda")),
        ("small network", lambda: check_precisions(SMALL, SMALL_LATENTS, recipes, "cuda", "cpu", gradients=True)),
        ("full network", lambda: check_precisions(UNetConfig(), 64, recipes, "cuda", "cuda", gradients=False)),
        *((f"capture of {recipe.implementation}", partial(check_captures, recipe)) for recipe in recipes),
    ]
