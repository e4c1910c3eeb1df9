"""Checks of plain recipes: right code is green, and each kind of wrong code is red."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.checks import differing, make_check, passed
from benchmarks.gpu_checks import CHECKED, MOST_WANTED_FIRST, full_network, small_network
from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import FAST_CHECKED, FAST_TIMED
from benchmarks.gpu_workload import PlainWorkload, Recipe
from benchmarks.network_checks import check_draws, check_precisions
from benchmarks.training_checks import check_replay
from tests.benchmarks.tiny import RECIPES, TINY, tiny_workload

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.implementation)
def test_replays_that_do_the_same_are_green(recipe: Recipe) -> None:
    workload = tiny_workload(recipe)
    checks = check_replay(workload, lambda: workload.iteration, recipe)
    assert [check["error"] for check in checks] == [0, 0, 0]
    assert passed(checks)


def _skip_draws(workload: PlainWorkload) -> Callable[[], object]:
    def replay() -> None:
        workload.iteration()
        workload.sample_indices.copy_(torch.arange(workload.batch))

    return replay


def _skip_optimizer(workload: PlainWorkload) -> Callable[[], object]:
    workload.optimizer.step = lambda: None  # type: ignore[assignment,method-assign]
    return workload.iteration


def _run_while_capturing(workload: PlainWorkload) -> Callable[[], object]:
    workload.iteration()
    return workload.iteration


@pytest.mark.parametrize("broken", [_skip_draws, _skip_optimizer, _run_while_capturing])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.implementation)
def test_replays_that_differ_are_red(
    recipe: Recipe, broken: Callable[[PlainWorkload], Callable[[], object]]
) -> None:
    workload = tiny_workload(recipe)
    checks = check_replay(workload, lambda: broken(workload), recipe)
    assert not passed(checks)


def test_draws_and_precisions_are_held_to_a_reference() -> None:
    assert passed(check_draws("cpu"))
    checks = check_precisions(TINY, 8, RECIPES, "cpu", "cpu", gradients=True)
    assert len(checks) == 6
    assert passed(checks)
    errors = {check["check"]: check["error"] for check in checks}
    assert errors["plain_fp32: output"] < 1e-5 < 1e-3 < errors["plain_autocast: output"]
    mislabelled = [dataclasses.replace(RECIPES[1], implementation="plain_fp32")]
    assert not passed(check_precisions(TINY, 8, mislabelled, "cpu", "cpu", gradients=False))


def test_nan_never_passes_and_nothing_is_not_green() -> None:
    check = make_check("a", float("nan"), 1.0)
    assert not check["passed"]
    assert check["error"] is None
    assert not passed([])


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0, 1.0])
    assert differing([nan], [nan.clone()]) == 0
    assert differing([nan], [torch.tensor([float("nan"), -0.0, 1.0])]) == 1


def test_every_group_gets_the_arguments_it_needs() -> None:
    groups = [*small_network(Device()), *full_network(Device())]
    assert len(groups) == 3 + len(CHECKED) + len(FAST_CHECKED) + len(FAST_TIMED)
    assert sorted(map(str, MOST_WANTED_FIRST)) == sorted(map(str, CHECKED))
    assert len({group.title for group in groups}) == len(groups)
    for group in groups:
        assert isinstance(group.run, partial)
        inspect.signature(group.run.func).bind(*group.run.args, **group.run.keywords)
