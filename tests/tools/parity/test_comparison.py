"""The rule of a comparison: twice plain torch's error and a floor; NaN is never allowed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sd_kernels.harness import FLOOR
from sd_perf.tools.parity.comparison import Comparer, Errors, relative_errors

comparer = Comparer(level="unet", where="gpu", dtype="float32")
ONES = [torch.ones(2)]


def test_nan_is_red() -> None:
    values = torch.tensor([1.0, float("nan")])
    line = comparer.tensors("prediction", fast=[values], torch_results=[ONES], truth=ONES)
    assert not line.ok and line.as_dict()["max_error"] == "nan"
    assert json.loads(json.dumps(line.as_dict()))["ok"] is False


def test_the_floor_is_allowed_where_torch_is_exact() -> None:
    line = comparer.tensors("prediction", fast=ONES, torch_results=[ONES], truth=ONES)
    assert line.ok and line.allowed == Errors(max=FLOOR, rms=FLOOR)


def test_what_must_be_equal() -> None:
    assert not comparer.equal("timesteps", different=0.1).ok
    assert comparer.equal("timesteps", different=0.0).ok


def test_errors_are_relative_to_each_tensor() -> None:
    truth = [torch.tensor([3.0, 4.0]), torch.tensor([200.0])]
    values = [torch.tensor([3.0, 4.4]), torch.tensor([210.0])]
    errors = relative_errors(values, truth)
    # Of the first tensor 0.4 / 4 and 0.4 / 5, of the second 10 / 200 in both measures.
    assert errors.max == pytest.approx(0.1, rel=1e-6)
    assert errors.rms == pytest.approx(math.sqrt((0.08**2 + 0.05**2) / 2), rel=1e-6)


def test_the_worst_of_plain_torch_counts() -> None:
    by_torch = [Errors(max=1e-3, rms=3e-4), Errors(max=2e-3, rms=1e-4)]
    line = comparer.errors("p", fast=Errors(max=3.9e-3, rms=5.9e-4), torch_errors=by_torch)
    assert line.ok and line.torch_error == Errors(max=2e-3, rms=3e-4)
    assert not comparer.errors("p", fast=Errors(max=4.1e-3, rms=0.0), torch_errors=by_torch).ok
    assert not comparer.errors("p", fast=Errors(max=0.0, rms=6.1e-4), torch_errors=by_torch).ok


def test_the_largest_error_can_be_without_limit() -> None:
    by_torch = [Errors(max=1e-3, rms=1e-3)]

    def ok(error: Errors) -> bool:
        return comparer.errors("p", fast=error, torch_errors=by_torch, limit_max=False).ok

    assert ok(Errors(max=1.0, rms=1e-3))
    assert not ok(Errors(max=1.0, rms=3e-3))
    assert not ok(Errors(max=math.nan, rms=1e-3))
    line = comparer.errors("p", fast=by_torch[0], torch_errors=by_torch, limit_max=False)
    assert line.as_dict()["max_budget"] == "inf"
