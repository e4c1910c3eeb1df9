"""The checks that run on a GPU before anything is timed, and which timings a red one forbids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.checks import Check, titled
from benchmarks.gpu_fast import FAST_CHECKED, FAST_FP32, FAST_TIMED, FastRecipe
from benchmarks.gpu_workload import AUTOCAST, FP32, MASTERS, Recipe
from benchmarks.network_checks import check_draws, check_precisions
from benchmarks.training_checks import ITERATIONS, check_replay, check_steps
from sd_perf.config import UNetConfig

SMALL = UNetConfig(model_channels=64, context_dim=128)
"""the benchmark's network at a fifth of its width, heads of 64 channels still"""
SMALL_LATENTS = 32
FULL, FULL_LATENTS = UNetConfig(), 64

CHECKED = (FP32, AUTOCAST, MASTERS, *FAST_CHECKED)


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


def check_groups() -> list[Group]:
    """All groups of checks, in the order in which they run."""
    yardsticks = [fast.yardstick for fast in FAST_CHECKED if fast.yardstick]
    recipes = [*(recipe for recipe in yardsticks if recipe not in CHECKED), *CHECKED]
    small: dict[str, Any] = {"config": SMALL, "latent_size": SMALL_LATENTS, "device": "cuda"}
    full: dict[str, Any] = {"config": FULL, "latent_size": FULL_LATENTS, "device": "cuda"}
    precisions = partial(check_precisions, recipes=recipes, gradients=True)
    groups: list[Group] = [
        Group("draws", partial(check_draws, "cuda")),
        Group("small network", partial(precisions, **small, reference_device="cpu")),
        Group("full network", partial(precisions, **full, reference_device="cuda")),
    ]
    for recipe in CHECKED:
        groups.append(Group("capture", partial(check_captures, recipe), recipe.implementation))
    for fast in FAST_CHECKED:
        steps = partial(check_steps, fast, **small, iterations=ITERATIONS)
        groups.append(Group("steps of the small network", steps, fast.implementation))
    for fast in FAST_TIMED:
        step = partial(check_steps, fast, **full, iterations=1)
        groups.append(Group("a step of the full network", step, fast.implementation))
    return groups


def check_captures(recipe: Recipe) -> list[Check]:
    """`check_replay` of the small network on the GPU, on a side stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        workload = recipe.workload(SMALL, batch=4, device="cuda", latent_size=SMALL_LATENTS)
        return check_replay(workload, lambda: workload.capture().replay, recipe)


def blocking(recipe: Recipe, checks: Sequence[Check]) -> list[str]:
    """Names of the red checks that forbid timing a recipe.

    A red check of a fast recipe forbids that recipe alone; one of the fast recipe in float32, which
    runs the same ops, forbids all fast ones. Any other red check forbids every recipe.
    """
    fast = {each.implementation for each in FAST_CHECKED}
    # Red checks of these fast recipes concern the recipe; all other fast ones do not.
    concerned = set()
    if isinstance(recipe, FastRecipe):
        concerned = {recipe.implementation, FAST_FP32.implementation}
    return [
        check["check"]
        for check in checks
        if not check["passed"] and (check["recipe"] not in fast or check["recipe"] in concerned)
    ]
