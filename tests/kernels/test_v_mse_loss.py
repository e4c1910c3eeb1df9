from __future__ import annotations

import pytest
import torch

from sd_kernels.errors import KernelError
from sd_kernels.v_mse_loss import SPEC
from sd_kernels.v_mse_loss.triton import v_mse_loss
from tests.kernels.faults import assert_caught

RAGGED = SPEC.small_cases[1]


@pytest.mark.parametrize(
    "fault",
    [
        ("difference) / N", f"difference) / {RAGGED.shape['B']}"),
        ("2.0 * tl.load(grad)", "tl.load(grad)"),
        ("2.0 * tl.load(grad)", "2.0"),
        ("return p - t,", "return t - p,"),
        ("difference * difference", "tl.abs(difference)"),
        ("programs = triton.cdiv(N, TUNING.block)", "programs = N // TUNING.block"),
        (
            "grid = (triton.cdiv(N, TUNING.block),)",
            "grid = (3,)",
        ),
    ],
    ids=[
        "mean over the batch alone",
        "gradient without the 2",
        "incoming gradient ignored",
        "gradient of the target",
        "sum of absolute values",
        "last block of the sum dropped",
        "last block of the gradient not written",
    ],
)
def test_planted_faults_are_red(fault: tuple[str, str]) -> None:
    assert_caught("v_mse_loss", RAGGED, fault)


def test_contiguous_memory_too(device: str) -> None:
    prediction, target = (torch.randn(3, 4, 9, 31, device=device) for _ in range(2))
    grads = []
    for order in (torch.contiguous_format, torch.channels_last):
        ordered = prediction.clone(memory_format=order).requires_grad_()
        grads += torch.autograd.grad(v_mse_loss(ordered, target.to(memory_format=order)), ordered)
        assert grads[-1].is_contiguous(memory_format=order)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_a_scaled_loss_keeps_small_gradients_of_half_precision(device: str) -> None:
    prediction = torch.randn(2, 4, 64, 64, device=device).half().requires_grad_()
    target = torch.randn(2, 4, 64, 64, device=device)
    (v_mse_loss(prediction, target) * 2.0**16).backward()
    expected = (prediction.detach().double() - target) * 2.0**17 / target.numel()
    torch.testing.assert_close(prediction.grad.double(), expected, rtol=2.0**-11 * 1.01, atol=1e-7)


IMAGE = torch.zeros(2, 4, 3, 5)


@pytest.mark.parametrize(
    ("prediction", "target", "words"),
    [
        (IMAGE.int(), IMAGE, "int32"),
        (IMAGE, IMAGE.double(), "float64"),
        (IMAGE[:0], IMAGE[:0], "empty shape"),
        (IMAGE, IMAGE[:1], r"\(2, 4, 3, 5\) and \(1, 4, 3, 5\); takes two tensors of one shape"),
        (
            IMAGE,
            IMAGE.to(memory_format=torch.channels_last),
            "strides .* takes two contiguous or two channels-last",
        ),
        (IMAGE[..., :4], IMAGE[..., :4], "strides"),
        (IMAGE, IMAGE.clone().requires_grad_(), "takes one that is detached"),
    ],
)
def test_bad_input_is_one_sentence(
    prediction: torch.Tensor, target: torch.Tensor, words: str
) -> None:
    with pytest.raises(KernelError, match=words):
        v_mse_loss(prediction, target)
