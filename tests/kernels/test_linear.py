from __future__ import annotations

from typing import Any

import pytest
import torch

from sd_kernels.errors import KernelError
from sd_kernels.linear import SPEC
from sd_kernels.linear.aten import linear
from sd_kernels.sd_v2_shapes import BATCH
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}


@pytest.mark.parametrize("call", ["F.linear(x, weight)", "F.linear(x, weight.flip(0), bias)"])
def test_planted_faults_are_red(call: str) -> None:
    assert_caught("linear", CASES["one row"], ("F.linear(x, weight, bias)", call), backend="torch")


def test_a_step_has_the_published_work() -> None:
    flops = sum(case.calls * SPEC.work(case, torch.bfloat16).flops for case in SPEC.cases) / BATCH
    assert flops == pytest.approx(259.8e9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 4)}, r"x \(..., K\)"),
        ({"bias": torch.zeros(3)}, r"bias \(N,\)"),
        ({"x": torch.zeros(0, 3)}, "empty shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.int8)}, "int8"),
        (
            {"weight": torch.zeros(4, 3).bfloat16(), "bias": None},
            "torch.float32 and torch.bfloat16; takes one dtype",
        ),
        ({"x": torch.zeros(())}, r"x \(..., K\)"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        linear(
            **{
                "x": torch.zeros(2, 3),
                "weight": torch.zeros(4, 3),
                "bias": torch.zeros(4),
                **changes,
            }
        )
