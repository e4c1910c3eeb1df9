"""The checks of networks on a GPU, and which of them a timing rests on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.checks import Check, titled
from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import (
    FAST_BF16,
    FAST_CHECKED,
    FAST_FP8,
    FAST_FP32,
    FAST_TIMED,
    FastRecipe,
)
from benchmarks.gpu_workload import AUTOCAST, FP32, MASTERS, Recipe
from benchmarks.network_checks import check_draws, check_precisions
from benchmarks.training_checks import ITERATIONS, check_replay, check_steps
from sd_perf.config import UNetConfig

PICTURES = "pictures"
"""`Check.recipe` of the loader's, on which no timing of a network rests"""
CHECKED = (FP32, AUTOCAST, MASTERS, *FAST_CHECKED)
MOST_WANTED_FIRST = (FAST_BF16, FAST_FP32, MASTERS, AUTOCAST, FP32, FAST_FP8)
"""`CHECKED` in the order in which their captures and steps are checked: time may run out"""


class Group(NamedTuple):
    """Checks that run together; one that raises is a single red check."""

    what: str
    run: Callable[[], list[Check]]
    recipe: str = ""
    """as `Check.recipe`"""

    @property
    def title(self) -> str:
        """As a red check of the whole group is called."""
        return titled(self.what, self.recipe)


def small_network(device: Device) -> list[Group]:
    """Checks of the small network, in the order in which they run."""
    name, sizes = device.name, _sizes(device, *device.small)
    precisions = partial(_precisions, **sizes, reference_device="cpu")
    groups = [Group("draws", partial(check_draws, name)), Group("small network", precisions)]
    for recipe in MOST_WANTED_FIRST:
        capture = partial(check_captures, recipe, device)
        groups.append(Group("capture", capture, recipe.implementation))
        if isinstance(recipe, FastRecipe):
            steps = partial(_steps, recipe, iterations=ITERATIONS, **sizes)
            groups.append(Group("steps of the small network", steps, recipe.implementation))
    return groups


def full_network(device: Device) -> list[Group]:
    """Checks of the full-size network."""
    sizes = _sizes(device, *device.full)
    precisions = partial(_precisions, **sizes, reference_device=device.name)
    groups = [Group("full network", precisions)]
    for fast in FAST_TIMED:
        step = partial(_steps, fast, iterations=1, **sizes)
        groups.append(Group("a step of the full network", step, fast.implementation))
    return groups


def _sizes(device: Device, config: UNetConfig, latent_size: int) -> dict[str, Any]:
    return {"config": config, "latent_size": latent_size, "device": device.name}


def _steps(recipe: FastRecipe, device: str, **options: Any) -> list[Check]:
    """`check_steps`; only a GPU must have launched kernels."""
    return check_steps(recipe, device=device, launches=device == "cuda", **options)


def _precisions(**sizes: Any) -> list[Check]:
    """`check_precisions` of every recipe; yardsticks come first."""
    yardsticks = [fast.yardstick for fast in FAST_CHECKED if fast.yardstick]
    recipes = [*(recipe for recipe in yardsticks if recipe not in CHECKED), *CHECKED]
    return check_precisions(recipes=recipes, gradients=True, **sizes)


def check_captures(recipe: Recipe, device: Device) -> list[Check]:
    """`check_replay` of the small network on a side stream."""
    config, latents = device.small
    with device.side_stream():
        workload = recipe.workload(config, batch=4, device=device.name, latent_size=latents)
        return check_replay(workload, workload.capture, recipe)


def unproven(recipe: Recipe, checks: Sequence[Check], done: Collection[str]) -> str | None:
    """The first check of networks on which a timing of the recipe rests and that is not green.

    `done` has the titles of the groups that have run. A fast recipe rests on its own checks and on
    those of the fast recipe in float32, which runs the same ops; any recipe on those of no recipe
    and on its own. A red check of a plain recipe stands against every recipe, since the plain ones
    are what the others are compared with. None: all are green.
    """
    fast = {each.implementation for each in FAST_CHECKED}
    own = {"", recipe.implementation}
    if isinstance(recipe, FastRecipe):
        own.add(FAST_FP32.implementation)
    for check in checks:
        of_others = check["recipe"] in fast - own or check["recipe"] == PICTURES
        if not check["passed"] and not of_others:
            return check["check"]
    for group in [*small_network(Device()), *full_network(Device())]:
        if group.recipe in own and group.title not in done:
            return f"{group.title} (not checked yet)"
    return None
