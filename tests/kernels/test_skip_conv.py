from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import harness
from sd_kernels.errors import KernelError
from sd_kernels.skip_conv import SPEC
from sd_kernels.skip_conv import cublas as products
from sd_kernels.spec import Case, Inputs
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}


FORWARD, DGRAD, WGRAD = "weight.flatten(1).t())", "mm(grad, weight.flatten(1))", "_rows(x))[:, :"


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("narrower", (FORWARD, "weight.flatten(1).t().flip(0))")),
        ("one pixel", (DGRAD, "mm(grad, weight.flatten(1).flip(1))")),
        ("pixels apart", (WGRAD, "_rows(x.flip(0)))[:, :")),
    ],
    ids=["wrong weights for y", "wrong weights for dx", "wrong rows for dweight"],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str]) -> None:
    assert_caught("skip_conv", CASES[case], fault, backend="cublas")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SPEC.small_cases[1:], ids=lambda case: case.name)
def test_rounding_is_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    verdicts = harness.check(SPEC, "cublas", case, dtype)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


class Names(TorchDispatchMode):
    """Keeps the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["narrower", "pixels apart"])
def test_nothing_is_copied(name: str) -> None:
    given = SPEC.inputs(CASES[name], Inputs(CASES[name], torch.float32))
    inputs = {key: value.detach() for key, value in given.items()}
    with Names() as names:
        y = products.skip_conv_forward._init_fn(**inputs)
        products.skip_conv_dgrad._init_fn(y, inputs["weight"])
        products.skip_conv_wgrad._init_fn(y, inputs["x"])
    views = ("permute", "view", "_unsafe_view", "slice", "t", "unsqueeze")
    working = [name for name in names.seen if name.split(".")[0] not in views]
    assert working == ["mm.default"] * 3


@pytest.mark.parametrize(("leaf", "gradient"), [("x", "dgrad"), ("weight", "wgrad")])
def test_no_gradient_is_made_unasked(leaf: str, gradient: str) -> None:
    given = SPEC.inputs(CASES["narrower"], Inputs(CASES["narrower"], torch.float32))
    inputs = {key: value.detach().requires_grad_(key == leaf) for key, value in given.items()}
    y = products.skip_conv(**inputs)
    with Names() as names:
        torch.autograd.grad(y.sum(), inputs[leaf])
    assert [name for name in names.seen if name.startswith("skip_conv")] == [
        f"skip_conv_{gradient}.default"
    ]


@pytest.mark.parametrize("name", ["tiny", "wider"])
def test_registered_as_torch_asks(name: str) -> None:
    inputs = SPEC.inputs(CASES[name], Inputs(CASES[name], torch.float32))
    torch.library.opcheck(products.skip_conv_forward, (inputs["x"], inputs["weight"]))
    compiled = torch.compile(products.skip_conv, fullgraph=True, backend="aot_eager")
    eager, traced = (
        harness.evaluate(SPEC, products.skip_conv, inputs),
        harness.evaluate(SPEC, compiled, inputs),
    )
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, rtol=0, atol=0, msg=key)


def test_a_gradient_may_come_in_another_memory_order() -> None:
    inputs = SPEC.inputs(CASES["narrower"], Inputs(CASES["narrower"], torch.float32))
    y = products.skip_conv(**inputs)
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
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 8, 4, 4)}, "x of shape .*channels-last"),
        ({"x": image(4, 8, 4, 8)[::2, :, :, ::2][:, :, ::2]}, "channels-last"),
        ({"x": image(0, 8, 4, 4)}, "none of them empty"),
        ({"x": torch.zeros(2, 8)}, "images"),
        ({"x": image(2, 8, 4, 4, dtype=torch.int64)}, "int64"),
        ({"x": image(2, 8, 4, 4, dtype=torch.bfloat16)}, "bfloat16 and torch.float32"),
        ({"weight": image(6, 8, 1, 1).to("meta")}, "cpu and meta"),
        ({"weight": image(6, 12, 1, 1)}, r"weight \(K, 8, 1, 1\)"),
        ({"weight": image(6, 8, 3, 3)}, r"weight \(K, 8, 1, 1\)"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    good = {"x": image(2, 8, 4, 4), "weight": image(6, 8, 1, 1)}
    with pytest.raises(KernelError, match=words):
        products.skip_conv(**{**good, **changes})
