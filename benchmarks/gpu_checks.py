"""The checks that a GPU goes through before anything is timed on it, and what a red one forbids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.checks import Check
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

Group = tuple[str, Callable[[], list[Check]]]
"""a group of checks: its name, and what runs it"""


def check_groups() -> list[Group]:
    """All groups of checks, in the order in which they run."""
    yardsticks = [fast.yardstick for fast in FAST_CHECKED if fast.yardstick]
    recipes = [*(recipe for recipe in yardsticks if recipe not in CHECKED), *CHECKED]
    small: dict[str, Any] = {"config": SMALL, "latent_size": SMALL_LATENTS, "device": "cuda"}
    full: dict[str, Any] = {"config": FULL, "latent_size": FULL_LATENTS, "device": "cuda"}
    precisions = partial(check_precisions, recipes=recipes, gradients=True)
    groups: list[Group] = [
        ("draws", partial(check_draws, "cuda")),
        ("small network", partial(precisions, **small, reference_device="cpu")),
        ("full network", partial(precisions, **full, reference_device="cuda")),
    ]
    for recipe in CHECKED:
        groups.append((f"{recipe.implementation}: capture", partial(check_captures, recipe)))
    for fast in FAST_CHECKED:
        steps = partial(check_steps, fast, **small, iterations=ITERATIONS)
        groups.append((f"{fast.implementation}: steps of the small network", steps))
    for fast in FAST_TIMED:
        step = partial(check_steps, fast, **full, iterations=1)
        groups.append((f"{fast.implementation}: a step of the full network", step))
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
    red = [check["check"] for check in checks if not check["passed"]]
    of_fast = {
        name: fast
        for name in red
        for fast in FAST_CHECKED
        if name.startswith(fast.implementation + ":")
    }
    concerned = (recipe, FAST_FP32) if isinstance(recipe, FastRecipe) else ()
    return [name for name in red if name not in of_fast or of_fast[name] in concerned]
