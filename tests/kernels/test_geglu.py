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
        ("rows * 2 * N + N + columns, dgate", "rows * 2 * N + columns, dgate"),
        ("value += tl.load(bias", "value -= tl.load(bias"),
        ("dgate_sums += dgate", "dgate_sums += dvalue"),
        ("dbias, column, column < N, tl.num_programs(0)", "dbias, column, column < N, 1"),
    ],
    ids=[
        "tanh GELU",
        "halves swapped",
        "wrong slope",
        "gradient of the gate not written",
        "bias subtracted",
        "halves of the bias's gradient mixed",
        "a stripe of the bias's gradient missing",
    ],
)
def test_planted_faults_are_red(fault: tuple[str, str]) -> None:
    assert_caught("geglu", CASE, fault)


@pytest.mark.parametrize(
    ("x", "bias", "words"),
    [
        (torch.zeros(2, 3), None, "even last axis"),
        (torch.zeros(2, 4, dtype=torch.int32), None, "int32"),
        (torch.zeros(0, 4), None, "empty shape"),
        (torch.zeros(2, 4), torch.zeros(2), r"a bias of shape \(2,\); takes \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4).bfloat16(), "one dtype"),
    ],
)
def test_bad_input_is_one_sentence(x: torch.Tensor, bias: torch.Tensor | None, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        geglu(x, bias)
