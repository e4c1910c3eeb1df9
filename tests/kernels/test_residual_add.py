from __future__ import annotations

import pytest
import torch

from sd_kernels.column_sum import TUNING, column_sum
from sd_kernels.errors import KernelError
from sd_kernels.residual_add import SPEC
from sd_kernels.residual_add.triton import residual_add
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("tokens, ragged", ("summed += tl.load(residual", "summed += 0.0 * tl.load(residual")),
        ("pixels apart", ("residual + rows * residual_stride", "residual + rows * C")),
        ("pixels apart", ("summed += tl.load(bias", "summed -= tl.load(bias")),
        (
            "two stages of sums",
            ("column_sum(_rows(dy), dy.dtype)", "column_sum(_rows(dy)[1:], dy.dtype)"),
        ),
    ],
    ids=[
        "no residual",
        "rows taken as adjacent",
        "bias subtracted",
        "a row of the bias gradient missing",
    ],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str]) -> None:
    assert_caught("residual_add", CASES[case], fault)


def test_the_gradient_is_returned_uncopied() -> None:
    x, residual = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    grad = torch.ones(2, 3)
    grads = torch.autograd.grad(residual_add(x, residual), (x, residual), grad)
    assert [each.data_ptr() for each in grads] == [grad.data_ptr()] * 2


def test_a_gradient_in_another_layout() -> None:
    x, residual = (torch.zeros(2, 5, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    bias = torch.zeros(5, requires_grad=True)
    grad = torch.arange(90.0).view(2, 5, 3, 3)
    (dbias,) = torch.autograd.grad(residual_add(x, residual, bias), bias, grad)
    torch.testing.assert_close(dbias, grad.sum((0, 2, 3)))


@pytest.mark.parametrize(
    "rows", [1, TUNING.single_stripe_rows, TUNING.single_stripe_rows + 1, 1500]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sum(rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :70]
    sums = column_sum(x, dtype)
    assert sums.dtype == dtype
    # Rounded once: sums of bfloat16 numbers in float32.
    expected = x.double().sum(0)
    torch.testing.assert_close(
        sums.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4 if rows > 1 else 0
    )


def wrong(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    images = {
        name: torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last)
        for name in ("x", "residual")
    }
    return images | {"bias": torch.zeros(4)} | changes


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (wrong(x=torch.zeros(2, 4, 3, 3, dtype=torch.int64)), "int64"),
        (wrong(x=torch.zeros(0, 4)), "empty shape"),
        (wrong(residual=torch.zeros(2, 4, 3, 3)), "channels-last"),
        (wrong(residual=torch.zeros(2, 4)), r"takes \(2, 4, 3, 3\) beside x"),
        (wrong(bias=torch.zeros(3)), r"shape \(3,\); takes \(4,\)"),
        (wrong(bias=torch.zeros(4, dtype=torch.bfloat16)), "one dtype"),
        (wrong(bias=torch.zeros(4, device="meta")), "one device"),
        (wrong(x=torch.zeros(())), "a number"),
    ],
)
def test_bad_input_is_one_sentence(inputs: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        residual_add(**inputs)
