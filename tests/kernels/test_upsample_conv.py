from __future__ import annotations

from typing import Any

import pytest
import torch

from sd_kernels import harness
from sd_kernels.errors import KernelError
from sd_kernels.spec import Case, Inputs
from sd_kernels.upsample_conv import SPEC, merged, triton
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}


@pytest.mark.parametrize(
    "fault",
    [
        (
            "merge_forward(weight).to(x.dtype), padding=1)",
            "merge_forward(weight), padding=1).roll(1, dims=2)",
        ),
        ("F.conv2d(x, merge", "F.conv2d(F.pad(x, (1, -1)), merge"),
        ("position * 4 + 2 * a + c", "position * 4 + 2 * c + a"),
        ("middle0 + bottom0, middle1 + bottom1, middle2 + bottom2", "bottom0, bottom1, bottom2"),
        ("tl.store(even + C, second + third", "tl.store(even + C, third"),
        (
            "mask=inside & has_pixel[:, None], other=0.0",
            "mask=inside & has_pixel[:, None], other=1.0",
        ),
        ("a, c = rows // 2 % 2, rows % 2", "a, c = rows % 2, rows // 2 % 2"),
        ("even0 + odd0, even1 + odd0, even1 + odd1", "even0 + odd0, even1, even1 + odd1"),
    ],
    ids=[
        "rows rolled over the border",
        "columns shifted",
        "parities swapped",
        "middle row left out",
        "middle column left out",
        "gradient beyond the border",
        "gradient's parities swapped",
        "gradient of the middle column",
    ],
)
def test_planted_faults_are_red(fault: tuple[str, str]) -> None:
    assert_caught("upsample_conv", CASES["ragged"], fault)


@pytest.mark.parametrize(
    "fault",
    [
        # As wide as before, with nothing beyond one border.
        (
            "F.conv2d(x, merge(weight).to(x.dtype), padding=1)",
            "F.conv2d(F.pad(x, (0, 2)), merge(weight), padding=(1, 0))",
        ),
        ("(first, second + third)", "(first, third)"),
        ("= small[:, a : a + H, c : c + W, a, c]", "= small[:, a : a + H, c : c + W, c, a]"),
        ("dy.new_zeros", "dy.new_ones"),
    ],
    ids=["padded on one side only", "middle tap left out", "parities swapped", "no zeros"],
)
def test_planted_faults_in_torch_are_red(fault: tuple[str, str]) -> None:
    assert_caught("upsample_conv", CASES["ragged"], fault, backend="merged", dtype=torch.float64)


@pytest.mark.parametrize("case", SPEC.small_cases, ids=lambda case: case.name)
def test_the_merged_form_is_exact(case: Case) -> None:
    inputs = SPEC.inputs(case, Inputs(case, torch.float64))
    plain, ours = (
        harness.evaluate(SPEC, function, inputs)
        for function in (SPEC.reference(), merged.upsample_conv)
    )
    for name, value in plain.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-12, atol=1e-12 * value.abs().max().item(), msg=name
        )


def test_kernels_and_torch_merge_and_interleave_alike() -> None:
    weight = torch.randn(5, 3, 3, 7).permute(0, 3, 1, 2)
    assert torch.equal(triton.merge_forward(weight), merged.merge(weight))
    z = torch.randn(2, 4, 5, 12).permute(0, 3, 1, 2)
    assert torch.equal(triton.interleave_forward(z), merged.interleave(z))


def test_error_in_low_precision_is_sqrt_2_of_torch_s() -> None:
    """The ratio that the docstring of `merged` states, in bfloat16.

    In float16 the convolutions of some CPUs add errors of their own.
    """
    case = Case("measured", {"B": 2, "C": 64, "H": 8, "W": 8, "K": 64})
    ratios: dict[str, list[float]] = {}
    for seed in range(4):
        for verdict in harness.check(SPEC, "merged", case, torch.bfloat16, seed=seed):
            assert verdict.ok, verdict
            ratios.setdefault(f"{verdict.output} {verdict.measure}", []).append(
                verdict.error / verdict.torch_error
            )
    mean = {name: sum(values) / len(values) for name, values in ratios.items()}
    assert mean["y rms"] == pytest.approx(1.42, abs=0.03)
    assert mean["grad weight rms"] == pytest.approx(1.42, abs=0.03)
    assert mean["grad x rms"] == pytest.approx(0.99, abs=0.03)


def test_a_gradient_may_come_in_another_memory_order() -> None:
    inputs = SPEC.inputs(CASES["ragged"], Inputs(CASES["ragged"], torch.float32))
    y = triton.upsample_conv(**inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    leaves, grad = list(inputs.values()), torch.randn(y.shape)
    expected = torch.autograd.grad(
        y, leaves, grad.contiguous(memory_format=torch.channels_last), retain_graph=True
    )
    for ours, other in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
        assert torch.equal(ours, other)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "function", [triton.upsample_conv, merged.upsample_conv], ids=["triton", "merged"]
)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 8, 4, 4)}, "upsample_conv: got x of shape .*channels-last"),
        ({"weight": torch.zeros(8, 8, 3, 3)}, "weight of shape .*channels-last"),
        ({"weight": image(8, 8, 1, 1)}, r"takes \(K, C, 3, 3\)"),
        ({"x": image(0, 8, 4, 4)}, "none of them empty"),
        ({"x": image(2, 8, 4, 4, dtype=torch.int32)}, "int32"),
        ({"weight": image(8, 8, 3, 3).bfloat16()}, "one dtype"),
        ({"weight": image(8, 8, 3, 3).to("meta")}, "one device"),
        ({"weight": image(8, 4, 3, 3)}, "as many channels"),
    ],
)
def test_bad_input_is_one_sentence(function: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        function(**{"x": image(2, 8, 4, 4), "weight": image(8, 8, 3, 3), **changes})


@pytest.mark.parametrize("module", [merged, triton])
def test_wide_weights_are_rounded_once(module: Any) -> None:
    """With a bfloat16 image the error is plain torch's; 16-bit weights give sqrt(2) times that."""
    case = CASES["one row, 320 channels"]
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    x = inputs["x"].detach().bfloat16().contiguous(memory_format=torch.channels_last)
    weight = inputs["weight"].detach()
    exact = SPEC.reference()(x.double(), weight.double())
    errors = [
        (y - exact).norm() for y in (module.upsample_conv(x, weight), SPEC.reference()(x, weight))
    ]
    assert (
        errors[0]
        < 1.1 * errors[1]
        < 0.9 * (module.upsample_conv(x, weight.bfloat16()) - exact).norm()
    )
    weight.requires_grad_()
    module.upsample_conv(x, weight).float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
