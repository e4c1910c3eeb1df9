"""Budgets, rates, and measurements that fail."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import timing
from benchmarks.attempts import attempt
from tests.benchmarks.tiny import THROUGHPUT, FakeClock


def test_rates_are_those_of_the_settled_half() -> None:
    calls: list[int] = []
    intervals = timing.timed(
        lambda: calls.append(0), 10, FakeClock([50.0] * 5 + [100.0, 100.0, 100.0, 900.0, 100.0])
    )
    rates = timing.rates(intervals, batch=20)
    assert len(calls) == 10
    assert rates["ms_per_iteration"] == 100.0
    assert rates["ms_per_sample"] == 5.0
    assert rates["samples_per_second"] == 200.0
    assert rates["samples_per_second_first_tenth"] == 400.0


def test_budget_can_be_overspent() -> None:
    now = iter([0.0, 10.0, 130.0])
    budget = timing.Budget(100.0, lambda: next(now))
    assert budget.left() == 90.0
    assert budget.left() == -30.0
    assert timing.repetitions(-5.0, 0.1, least=10, most=100) == 10
    assert timing.repetitions(5.0, 0.1, least=10, most=40) == 40
    assert timing.repetitions(5.0, 0.25, least=10, most=40) == 20


def test_memory_that_runs_out_is_a_row_and_not_a_crash() -> None:
    def fail_to_end_the_capture() -> dict[str, Any]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("capture invalidated")

    def break_otherwise() -> dict[str, Any]:
        raise RuntimeError("no kernel")

    assert attempt(lambda: THROUGHPUT) == THROUGHPUT
    assert attempt(fail_to_end_the_capture)["status"] == "out of memory"
    assert attempt(break_otherwise) == {"status": "failed", "reason": "no kernel"}
