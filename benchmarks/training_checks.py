"""Do training iterations do the right thing: losses, weight updates, draws, kernel launches?

Replays of a captured iteration are compared with eager ones, and a fast recipe's iterations with
plain float32 ones from the same weights and samples.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.checks import Check, differing, make_check, relative_error
from benchmarks.gpu_fast import FastRecipe, FastWorkload
from benchmarks.gpu_workload import FP32, Recipe, Workload
from sd_kernels import launch
from sd_kernels.harness import FLOOR
from sd_kernels.registry import all_ops
from sd_perf.config import UNetConfig

ITERATIONS = 3


@dataclass(frozen=True)
class Allowed:
    """Largest errors of training iterations."""

    loss: float
    """largest relative difference of a loss"""
    update: float
    """norm of the difference between weight updates, relative to the right updates' norm"""


REPLAY_BUDGETS = {
    True: Allowed(loss=1e-5, update=1e-3),
    False: Allowed(loss=1e-3, update=0.2),
}
"""allowed between replays and eager iterations, by whether all arithmetic is float32. Early AdamW
steps have the size of the learning rate and the sign of the gradient, so that a rounding error
reverses the whole step of a tiny gradient"""
FAST_FLOORS = {
    True: Allowed(loss=1e-5, update=1e-3),
    False: Allowed(loss=1e-3, update=1e-3),
}
"""allowed to a fast recipe in addition to twice its yardstick's error, by whether all is float32.
That error can be 0: the yardstick may be the float32 iterations themselves"""
TARGET_BUDGET = 1e-6
"""relative error of the v-target: float32 arithmetic on equal draws"""


@dataclass(frozen=True)
class Trained:
    """What some iterations did."""

    losses: torch.Tensor
    """(iterations,) float64 on the CPU"""
    start: torch.Tensor
    """all float32 masters before the iterations, in one vector"""
    update: torch.Tensor
    """the masters after the iterations less `start`"""
    launches: Counter[str]
    """launches of Triton kernels, by the kernel's name"""


def train(workload: Workload, call: Callable[[], object], iterations: int) -> Trained:
    """Run `call` so many times: an iteration of the workload, or a replay of one."""
    before = launch.executed.copy()
    start = torch.cat([master.flatten() for master in workload.masters()])
    losses = []
    for _ in range(iterations):
        call()
        losses.append(workload.loss.double().cpu())
    update = torch.cat([master.flatten() for master in workload.masters()]).sub_(start)
    return Trained(torch.stack(losses), start, update, launch.executed - before)


def check_replay(
    workload: Workload, capture: Callable[[], Callable[[], object]], recipe: Recipe
) -> list[Check]:
    """Replays of the captured iteration against eager iterations from the same state.

    `capture` captures the workload's iteration and returns what replays it; it must leave the state
    as it was. The eager iterations are its warm-up.
    """
    start = [tensor.clone() for tensor in workload.state()]
    eager = train(workload, workload.iteration, ITERATIONS)
    workload.reset()
    replay = capture()
    changed = differing(workload.state(), start)
    replayed = train(workload, replay, ITERATIONS)
    allowed, check = REPLAY_BUDGETS[_is_float32(recipe)], _checks_of(recipe.implementation)
    losses, updates = _loss_error(replayed, eager), relative_error(replayed.update, eager.update)
    state = "elements of the state unlike the start's after warm-up, reset and capture"
    return [
        check(state, changed, 0),
        check("losses of replays against eager iterations", losses, allowed.loss),
        check("weight updates of replays against eager iterations", updates, allowed.update),
    ]


def check_steps(
    recipe: FastRecipe,
    config: UNetConfig,
    latent_size: int,
    device: str,
    iterations: int,
    launches: bool = True,
) -> list[Check]:
    """Iterations of a fast recipe on 2 samples: losses, AdamW's updates, launches and draws.

    launches: whether Triton kernels must have been launched, as on a GPU.
    """

    def trained(each: Recipe) -> tuple[Workload, Trained]:
        workload = each.workload(config, batch=2, device=device, latent_size=latent_size)
        return workload, train(workload, workload.iteration, iterations)

    # The plain workloads are dropped at once: one network after the other is in memory.
    exact, yardstick = trained(FP32)[1], trained(recipe.yardstick or FP32)[1]
    workload, fast = trained(recipe)
    assert isinstance(workload, FastWorkload)
    checks = compare_training(recipe, fast, yardstick=yardstick, exact=exact)
    if launches:
        checks.append(check_launches(recipe.implementation, workload.kernels, fast.launches))
    workload.sample_indices += 2**33
    return checks + check_inputs(workload, recipe.implementation)


def compare_training(
    recipe: Recipe, fast: Trained, yardstick: Trained, exact: Trained
) -> list[Check]:
    """A fast recipe's iterations against plain float32 ones, `exact`.

    It may make twice the error of its yardstick, plus `FAST_FLOORS`.
    """
    floors, check = FAST_FLOORS[_is_float32(recipe)], _checks_of(recipe.implementation)
    note = f"{len(exact.losses)} iterations against float32; twice the yardstick's error"
    losses, updates = _loss_error(fast, exact), relative_error(fast.update, exact.update)
    loss_budget = 2 * _loss_error(yardstick, exact) + floors.loss
    update_budget = 2 * relative_error(yardstick.update, exact.update) + floors.update
    unlike = differing([fast.start], [exact.start])
    return [
        check("masters unlike the plain start", unlike, 0),
        check("losses of training", losses, loss_budget, note=note),
        check("updates of AdamW", updates, update_budget, note=note),
    ]


def _checks_of(recipe: str) -> Callable[..., Check]:
    """`make_check` for a recipe."""
    return partial(make_check, recipe=recipe)


def _loss_error(trained: Trained, right: Trained) -> float:
    return ((trained.losses - right.losses).abs() / right.losses.abs()).max().item()


def _is_float32(recipe: Recipe) -> bool:
    return recipe.weights == torch.float32 and not recipe.autocast


def check_launches(name: str, kernels: Mapping[str, str], launches: Mapping[str, int]) -> Check:
    """Every op for which Triton was chosen must have launched a kernel, and there must be one.

    kernels: backend by op. launches: count by the kernel's name.
    """
    chosen = [op for op, backend in kernels.items() if backend == all_ops()[op].ours]
    silent = [op for op in chosen if not any(launches.get(kernel) for kernel in _kernels_of(op))]
    backends = ", ".join(f"{op} {kernels[op]}" for op in sorted(kernels))
    note = f"{sum(launches.values())} launches; backends: {backends}"
    note += f"; silent: {', '.join(silent)}" if silent else ""
    what = "operators on Triton without a launch (no such operator counts as one)"
    return make_check(what, len(silent) if chosen else 1, 0, note=note, recipe=name)


def _kernels_of(op: str) -> set[str]:
    """Names of the kernels in an op's imported modules; a kernel that ran has been imported."""
    prefix = f"sd_kernels.{op}."
    modules = [module for name, module in sys.modules.items() if name.startswith(prefix)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def check_inputs(workload: FastWorkload, name: str) -> list[Check]:
    """The fused draws of the current samples against the plain diffusion step's, on one device."""
    schedule, samples = workload.diffusion.schedule, (workload.moments, workload.sample_indices)
    noisy, target, timesteps = workload.trained.diffusion.draw(*samples)
    latents, noise, right = workload.diffusion.draw(*samples)
    right_noisy = schedule.add_noise(latents, noise, right)
    target_error = relative_error(target, schedule.target(latents, noise, right))
    noisy_error = relative_error(noisy, right_noisy)
    rounding = relative_error(right_noisy.to(noisy.dtype), right_noisy)
    unlike, check = differing([timesteps], [right]), _checks_of(name)
    return [
        check("timesteps unlike the plain step's", unlike, 0),
        check("v-target", target_error, TARGET_BUDGET),
        check("noised latents", noisy_error, 2 * rounding + FLOOR, note="twice the rounding"),
    ]
