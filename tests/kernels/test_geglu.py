from __future__ import annotations

import pytest
import torch

from sd_kernels.errors import KernelError
from sd_kernels.geglu import SPEC
from sd_kernels.geglu.triton import geglu
from tests.kernels.faults import assert_caught

CASE = SPEC.small_cases[2]


@pytest.mark.parametrize(
    "fault",
    [
        (
            "0.5 * (1.0 + tl.erf(x * 0.7071067811865476))",
            "tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))",
        ),
        ("value * (gate * _normal_cdf(gate))", "gate * (value * _normal_cdf(value))"),
        ("slope = cdf + gate", "slope = cdf - gate"),
        ("rows * 2 * N + N + columns, grad", "rows * 2 * N + columns, grad"),
    ],
    ids=["tanh GELU", "halves swapped", "wrong slope", "gradient of the gate not written"],
)
def test_planted_faults_are_red(fault: tuple[str, str]) -> None:
    assert_caught("geglu", CASE, fault)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3), "even last axis"),
        (torch.zeros(2, 4, dtype=torch.int32), "int32"),
        (torch.zeros(0, 4), "empty shape"),
    ],
)
def test_bad_input_is_one_sentence(x: torch.Tensor, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        geglu(x)
