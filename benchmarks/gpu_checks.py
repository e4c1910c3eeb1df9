"""Correctness before speed: networks, draws and captured iterations, held to budgets on this
machine.

The plain recipes are held to float64 by fixed budgets, the fast ones by the house rule: at most
twice the error that plain operations in the same number formats make on the same weights and
inputs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_fast import FAST_CHECKED, FAST_FP32, FAST_TIMED, FastRecipe, FastWorkload
from benchmarks.gpu_workload import (
    AUTOCAST,
    FP32,
    MASTERS,
    Predictor,
    Recipe,
    Workload,
    channels_last,
    make_inputs,
    randomize,
)
from sd_kernels import launch
from sd_kernels.harness import FLOOR
from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.diffusion.randomness import Stream, normal, philox, uniform_integers
from sd_perf.files import one_line
from sd_perf.reference.unet import UNet

Check = dict[str, Any]
"""check, error, budget, passed, note"""

SMALL = UNetConfig(model_channels=64, context_dim=128)
"""the benchmark's network at a fifth of its width, heads of 64 channels still"""
SMALL_LATENTS = 32
CONTEXT_TOKENS = 77

CHECKED = (FP32, AUTOCAST, MASTERS, *FAST_CHECKED)
PRECISION_BUDGET = {"plain_fp32": 1e-4, "plain_autocast": 3e-2, "plain_bf16_masters": 3e-2}
"""of ||out - ref|| / ||ref|| against float64. On a CPU the small network has 1.6e-6 in fp32 and
1.3e-2 in bf16; TF32 rounds 8 times finer than bf16, so it would fail as fp32"""
WORST = "gradient of the worst parameter"
SMALL_GRADIENT = 1e-3
"""of the root mean square of all gradients: one that is smaller counts by this, since rounding is
all there is of it"""
REPLAY_BUDGETS = {True: (1e-5, 1e-3), False: (1e-3, 0.2)}
"""by whether all arithmetic is float32: of the relative difference between the losses of replays
and of eager iterations; and of the difference between the weights after them, in units of what the
iterations changed. Early AdamW steps are near the sign of the gradient, so rounding that differs
from run to run turns whole steps of tiny gradients"""
STEP_FLOORS = {True: (1e-5, 1e-3), False: (1e-3, 1e-3)}
"""likewise, of what is allowed of a fast recipe's losses and updates beside plain float32 ones,
where its yardstick is these themselves, or was lucky"""
TARGET_BUDGET = 1e-6
"""of the v-target: float32 arithmetic on draws that are the same"""
REPLAYED_ITERATIONS = 3


def make_check(name: str, error: float, budget: float, note: str = "") -> Check:
    """One line of the correctness table. An error that is not finite is kept as None, and never
    passes."""
    finite = math.isfinite(error)
    return {
        "check": name,
        "error": error if finite else None,
        "budget": budget,
        "passed": finite and error <= budget,
        "note": note,
    }


def guarded(name: str, group: Callable[[], list[Check]]) -> list[Check]:
    """The group's checks; one red check of that name where it raises."""
    try:
        return group()
    except Exception as error:  # a missing kernel must not hide what other checks find
        return [make_check(name, math.nan, 0.0, one_line(error))]


def against(recipe: Recipe, checks: Sequence[Check]) -> list[str]:
    """Names of the red checks for which a recipe must not be timed.

    What is red of a fast recipe says nothing against the others, but that of the one in float32,
    which has the same operators, stands against all fast ones. What is red of anything else stands
    against all.
    """
    red = [check["check"] for check in checks if not check["passed"]]
    of_fast = {
        name: fast
        for name in red
        for fast in FAST_CHECKED
        if name.startswith(fast.implementation + ":")
    }
    concerned = (recipe, FAST_FP32) if isinstance(recipe, FastRecipe) else ()
    return [name for name in red if name not in of_fast or of_fast[name] in concerned]


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
    """Philox words, timesteps and normals of the device against the CPU's, for indices past
    2**32."""
    indices = torch.tensor([0, 1, 2**31, 2**40 + 7])
    draws: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "Philox words": lambda index: philox(2**33 + 5, Stream.NOISE, index, 4096),
        "timesteps": lambda index: uniform_integers(
            5, Stream.TIMESTEP, index, DiffusionConfig().num_timesteps
        ),
        "normals": lambda index: normal(5, Stream.NOISE, index, 4 * 64 * 64),
    }
    checks = []
    for name, draw in draws.items():
        unlike = differing([draw(indices)], [draw(indices.to(device))])
        checks.append(make_check(f"draws: {name}, elements unlike the CPU's", unlike, 0))
    return checks


def _evaluate(
    unet: torch.nn.Module, recipe: Recipe, inputs: tuple[torch.Tensor, ...], gradients: bool
) -> list[torch.Tensor]:
    """Output and, if asked for, the gradients of sum(output^2) / 2 over all parameters."""
    with torch.set_grad_enabled(gradients):
        out = Predictor(unet, recipe)(*inputs)
        parts = torch.autograd.grad(out, list(unet.parameters()), out.detach()) if gradients else ()
    return [out.detach(), *parts]


def _errors(results: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """Relative errors of output, of all gradients as one vector, and of the gradient that is
    furthest off."""
    errors = {"output": relative_error(results[0], exact[0])}
    if len(exact) == 1:
        return errors
    pairs = list(zip(results[1:], exact[1:], strict=True))
    off = [(mine.to(right.device).double() - right).norm().item() for mine, right in pairs]
    norms = [right.norm().item() for _, right in pairs]
    rms = math.hypot(*norms) / math.sqrt(sum(right.numel() for _, right in pairs))
    least = [SMALL_GRADIENT * rms * math.sqrt(right.numel()) for _, right in pairs]
    worst = max(
        error / max(norm, floor) for error, norm, floor in zip(off, norms, least, strict=True)
    )
    return errors | {"gradients": math.hypot(*off) / math.hypot(*norms), WORST: worst}


def check_precisions(
    config: UNetConfig,
    latent_size: int,
    recipes: Sequence[Recipe],
    device: str,
    reference_device: str,
    gradients: bool,
) -> list[Check]:
    """Output, and gradients if asked for, of each recipe on the device against float64 on the
    reference device.

    Weights and inputs are the same float32 values, so the error of a recipe includes its rounding
    of them.
    """
    with torch.device(reference_device):
        unet = channels_last(UNet(config))
        randomize(unet, seed=0)
    batch = 2 if gradients else 1
    indices = torch.arange(batch)
    moments, context = make_inputs(config, indices, latent_size, CONTEXT_TOKENS, seed=0)
    latents = moments.chunk(2, dim=1)[0] * DiffusionConfig().latent_scale
    inputs = (latents, 500 + 37 * indices, context)
    exact = _evaluate(
        copy.deepcopy(unet).double(),
        dataclasses.replace(FP32, weights=torch.float64),
        _moved(inputs, reference_device),
        gradients,
    )
    shape = f"{config.model_channels} channels, {latent_size}x{latent_size}, batch {batch}"
    note = f"float64 on {reference_device}; {shape}"
    errors: dict[str, dict[str, float]] = {}
    checks: list[Check] = []

    def of_recipe(recipe: Recipe) -> list[Check]:
        copied = recipe.unet(config, device)
        copied.load_state_dict(unet.state_dict())
        results = _evaluate(copied.to(recipe.weights), recipe, _moved(inputs, device), gradients)
        errors[recipe.implementation] = _errors(results, exact)
        return _precision_checks(recipe, errors, note)

    for recipe in recipes:
        checks += guarded(f"{recipe.implementation}: {note}", partial(of_recipe, recipe))
    return checks


def _precision_checks(
    recipe: Recipe, errors: Mapping[str, Mapping[str, float]], note: str
) -> list[Check]:
    name, checks = recipe.implementation, []
    for what, error in errors[name].items():
        if not isinstance(recipe, FastRecipe):
            if what != WORST:
                checks.append(make_check(f"{name}: {what}", error, PRECISION_BUDGET[name], note))
        elif recipe.yardstick:
            yardstick = recipe.yardstick.implementation
            budget = 2 * errors[yardstick][what] + FLOOR
            checks.append(
                make_check(f"{name}: {what}", error, budget, f"twice {yardstick}; {note}")
            )
    return checks


def _moved(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _is_float32(recipe: Recipe) -> bool:
    return recipe.weights == torch.float32 and not recipe.autocast


def check_replay(
    workload: Workload, capture: Callable[[], Callable[[], object]], recipe: Recipe
) -> list[Check]:
    """Eager iterations against replays of the captured one from the same state, and what the
    capture changed.

    `capture` captures the workload's iteration and returns what replays it; the eager iterations
    are its warm-up.
    """
    start = [tensor.clone() for tensor in workload.state()]
    eager = train(workload, workload.iteration, REPLAYED_ITERATIONS)
    workload.reset()
    replay = capture()
    changed = differing(workload.state(), start)
    replayed = train(workload, replay, REPLAYED_ITERATIONS)
    name, (loss_budget, update_budget) = recipe.implementation, REPLAY_BUDGETS[_is_float32(recipe)]
    return [
        make_check(
            f"{name}: elements of the state unlike the start's after warm-up, reset and capture",
            changed,
            0,
        ),
        make_check(
            f"{name}: losses of replays against eager iterations",
            _loss_error(replayed, eager),
            loss_budget,
        ),
        make_check(
            f"{name}: weight updates of replays against eager iterations",
            relative_error(replayed.update, eager.update),
            update_budget,
        ),
    ]


@dataclass(frozen=True)
class Trained:
    """What some iterations did."""

    losses: torch.Tensor
    """(iterations,) float64 on the CPU"""
    start: torch.Tensor
    """float32 masters before them, all in one vector"""
    update: torch.Tensor
    """what they added to the masters"""
    launches: Counter[str]
    """of Triton kernels, by name"""


def train(workload: Workload, call: Callable[[], object], iterations: int) -> Trained:
    """Run `call`, an iteration of the workload or a replay of one, so many times from the state
    that it is in."""
    before = launch.executed.copy()
    start = torch.cat([master.flatten() for master in workload.masters()])
    losses = []
    for _ in range(iterations):
        call()
        losses.append(workload.loss.double().cpu())
    update = torch.cat([master.flatten() for master in workload.masters()]).sub_(start)
    return Trained(torch.stack(losses), start, update, launch.executed - before)


def _loss_error(trained: Trained, right: Trained) -> float:
    return ((trained.losses - right.losses).abs() / right.losses.abs()).max().item()


def compare_training(
    recipe: Recipe, fast: Trained, yardstick: Trained, exact: Trained
) -> list[Check]:
    """A fast recipe's iterations against the plain ones in float32, beside the error of its
    yardstick."""
    name, iterations = recipe.implementation, len(exact.losses)
    note = f"{iterations} iterations against float32; twice the yardstick's error"
    loss_floor, update_floor = STEP_FLOORS[_is_float32(recipe)]
    loss_budget = 2 * _loss_error(yardstick, exact) + loss_floor
    update_budget = 2 * relative_error(yardstick.update, exact.update) + update_floor
    return [
        make_check(
            f"{name}: masters unlike the plain start", differing([fast.start], [exact.start]), 0
        ),
        make_check(f"{name}: losses of training", _loss_error(fast, exact), loss_budget, note),
        make_check(
            f"{name}: updates of AdamW",
            relative_error(fast.update, exact.update),
            update_budget,
            note,
        ),
    ]


def check_launches(name: str, kernels: Mapping[str, str], launches: Mapping[str, int]) -> Check:
    """That every operator for which Triton was chosen ran a kernel of its own, and that there is
    one."""
    chosen = [op for op, backend in kernels.items() if backend == "triton"]
    silent = [op for op in chosen if not any(launches.get(kernel) for kernel in _kernels_of(op))]
    note = (
        f"{sum(launches.values())} launches; backends: "
        f"{', '.join(f'{op} {kernels[op]}' for op in sorted(kernels))}"
    )
    note = f"{note}; silent: {', '.join(silent)}" if silent else note
    count = len(silent) if chosen else 1
    return make_check(
        f"{name}: operators on Triton without a launch (no such operator counts as one)",
        count,
        0,
        note,
    )


def _kernels_of(op: str) -> set[str]:
    """Names of the kernels in an operator's modules; those of an operator that ran are imported."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith(f"sd_kernels.{op}.")
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def check_inputs(workload: FastWorkload, name: str) -> list[Check]:
    """The fused draws of the current samples against the plain diffusion step's, on the same
    device."""
    diffusion, indices = workload.diffusion, workload.sample_indices
    noisy, target, timesteps = workload.step.draw(workload.moments, indices)
    latents, noise, right = diffusion.draw(workload.moments, indices)
    right_noisy = diffusion.schedule.add_noise(latents, noise, right)
    right_target = diffusion.schedule.v_target(latents, noise, right)
    budget = 2 * relative_error(right_noisy.to(noisy.dtype), right_noisy) + FLOOR
    return [
        make_check(
            f"{name}: timesteps unlike the plain step's", differing([timesteps], [right]), 0
        ),
        make_check(f"{name}: v-target", relative_error(target, right_target), TARGET_BUDGET),
        make_check(
            f"{name}: noised latents",
            relative_error(noisy, right_noisy),
            budget,
            "twice the rounding",
        ),
    ]


def check_steps(
    recipe: FastRecipe, config: UNetConfig, latent_size: int, device: str, iterations: int
) -> list[Check]:
    """Draws, losses, AdamW's updates and Triton's launches of a fast recipe in some iterations of 2
    samples."""

    def trained(each: Recipe) -> tuple[Workload, Trained]:
        workload = each.workload(config, 2, device, latent_size=latent_size)
        return workload, train(workload, workload.iteration, iterations)

    # One network after the other is in memory.
    exact, yardstick = trained(FP32)[1], trained(recipe.yardstick or FP32)[1]
    workload, mine = trained(recipe)
    assert isinstance(workload, FastWorkload)
    checks = compare_training(recipe, mine, yardstick, exact)
    checks.append(check_launches(recipe.implementation, workload.kernels, mine.launches))
    workload.sample_indices += 2**33
    return checks + check_inputs(workload, recipe.implementation)


def check_captures(recipe: Recipe) -> list[Check]:
    """`check_replay` of the small network on the GPU, on a side stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        workload = recipe.workload(SMALL, 4, "cuda", latent_size=SMALL_LATENTS)
        return check_replay(workload, lambda: workload.capture().replay, recipe)


def gpu_checks() -> list[tuple[str, Callable[[], list[Check]]]]:
    """Name and function of every group of checks that a GPU goes through before it is timed."""
    yardsticks = [
        fast.yardstick for fast in FAST_CHECKED if fast.yardstick and fast.yardstick not in CHECKED
    ]
    recipes = (*yardsticks, *CHECKED)
    small, full = (SMALL, SMALL_LATENTS), (UNetConfig(), 64)
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("draws", lambda: check_draws("cuda")),
        ("small network", lambda: check_precisions(*small, recipes, "cuda", "cpu", gradients=True)),
        ("full network", lambda: check_precisions(*full, recipes, "cuda", "cuda", gradients=True)),
    ]
    for recipe in CHECKED:
        groups.append((f"{recipe.implementation}: capture", partial(check_captures, recipe)))
    for fast in FAST_CHECKED:
        steps = partial(check_steps, fast, *small, "cuda", REPLAYED_ITERATIONS)
        groups.append((f"{fast.implementation}: steps of the small network", steps))
    for fast in FAST_TIMED:
        groups.append(
            (
                f"{fast.implementation}: a step of the full network",
                partial(check_steps, fast, *full, "cuda", 1),
            )
        )
    return groups
