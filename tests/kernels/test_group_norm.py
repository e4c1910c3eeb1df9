from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import harness
from sd_kernels.errors import KernelError
from sd_kernels.group_norm import NOTHING, SPEC, tiles
from sd_kernels.group_norm import triton as kernels
from sd_kernels.group_norm.aten import group_norm as torchs
from sd_kernels.launch import recording
from sd_kernels.spec import Case, Draw, Inputs
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}
SMALLER: dict[str, dict[str, int]] = {
    "several tiles": {"C1": 96},
    "two sources, groups astride": {"C1": 32, "C2": 64},
}
"""changes of shape with which a case shows the same in a fraction of the time"""


def smaller(name: str) -> Case:
    shape = {**CASES[name].shape, **SMALLER.get(name, {})}
    return replace(CASES[name], shape=shape)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("shifted mean", ("deviation / (N * CPG) + eps)", "deviation / (N * CPG) + 1e-3)")),
        ("nothing added", ("deviation / (N * CPG) + eps)", "deviation / (N * CPG - 1) + eps)")),
        ("several tiles", ("tile_deviation + count * offset * offset", "tile_deviation")),
        (
            "several tiles",
            ("value += load_pixels(residual", "value = value + 0.0 * load_pixels(residual"),
        ),
        ("pixels apart", ("value += tl.where(first, added[None, :], 0.0)", "value += 0.0")),
        (
            "two sources, groups astride",
            (
                "(sample, rows, channels - C1)\n        raw",
                "(sample, rows, channels - C1 + 1)\n        raw",
            ),
        ),
        (
            "ragged channels",
            ("value = value * sigmoid(value)", "value = value * sigmoid(1.702 * value)"),
        ),
        (
            "several tiles",
            ("grad += _later_uses(dsummed", "grad = grad + 0.0 * _later_uses(dsummed"),
        ),
        ("several tiles", ("grad += load_pixels(dagain", "grad += 0.0 * load_pixels(dagain")),
        ("ragged channels", ("store_pixels(dskip, grad,", "store_pixels(dskip, value,")),
        ("nothing added", ("- plain_mean - value * product_mean", "- plain_mean")),
        ("tiny", ("grad -= N * to_channels(plain", "grad -= to_channels(plain")),
        (
            "tiny",
            (
                "if SUMS > 3:\n            grad += tl.sum",
                "if SUMS > 4:\n            grad += tl.sum",
            ),
        ),
        ("several tiles", ("exists = (tiles < PIXEL_TILES)", "exists = (tiles < 1)")),
        ("transformer's", ("(samples < B) & is_channel", "(samples < 1) & is_channel")),
    ],
    ids=[
        "wrong eps",
        "unbiased variance",
        "tiles' means forgotten",
        "missing residual",
        "missing shift",
        "skip astray",
        "wrong SiLU",
        "gradients of the sum lost",
        "second gradient of the sum lost",
        "skip without its gradient",
        "variance's gradient lost",
        "shift's gradient wrong",
        "shift without the sum",
        "one tile's weight gradient",
        "one sample's weight gradient",
    ],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str]) -> None:
    assert_caught("group_norm", smaller(case), fault)


def test_one_pass_variance_is_red() -> None:
    case = replace(
        CASES["pixels apart"], name="far mean", draw=Draw(mean=30.0, std=0.5), extras=NOTHING
    )
    one_pass = "to_groups(tl.sum(value * value, axis=0), member) - elements * own_mean * own_mean"
    assert_caught(
        "group_norm",
        case,
        ("to_groups(tl.sum(difference * difference, axis=0), member)", one_pass),
    )


def results(case: Case) -> dict[str, torch.Tensor]:
    return harness.evaluate(
        SPEC, kernels.group_norm, SPEC.inputs(case, Inputs(case, torch.float32))
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("window", [1, 64])
def test_the_lag_between_statistics_and_results_changes_nothing(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(smaller("several tiles"))
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(tiles, "TUNING", replace(tiles.TUNING, window=window))
    for name, value in results(smaller("several tiles")).items():
        assert torch.equal(value, expected[name]), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    case = CASES["shifted mean"]
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    alone = {**inputs, "x": inputs["x"][1:], "shift": inputs["shift"][1:]}
    assert torch.equal(kernels.group_norm(**alone)[0], kernels.group_norm(**inputs)[1])


def test_a_gradient_may_come_in_another_memory_order() -> None:
    case = CASES["nothing added"]
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    y = kernels.group_norm(**inputs)
    grad = torch.randn(y.shape)
    expected = torch.autograd.grad(
        y, inputs["x"], grad.contiguous(memory_format=torch.channels_last), retain_graph=True
    )
    assert torch.equal(torch.autograd.grad(y, inputs["x"], grad)[0], expected[0])


class Launches(TorchDispatchMode):
    """Counts what torch launches besides: everything but views and new, unwritten tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name() and "sd_kernels" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["two sources, groups astride", "several tiles", "nothing added"])
def test_either_pass_is_one_launch(name: str) -> None:
    case = smaller(name)
    inputs = SPEC.inputs(case, Inputs(case, torch.float32, empty=True))
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    with recording() as forward:
        results = kernels.group_norm(**inputs)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.empty_like(y) for y in results]
    with recording() as backward, Launches() as others:
        torch.autograd.grad(results, leaves, grads)
    assert [each.kernel.__name__ for each in forward] == ["group_norm_forward_kernel"]
    assert [each.kernel.__name__ for each in backward] == ["group_norm_backward_kernel"]
    assert others.names == []


def test_a_launch_finds_the_counters_as_the_one_before_it_left_them() -> None:
    case = smaller("several tiles")
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    first, second = (harness.evaluate(SPEC, kernels.group_norm, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("function", [torchs, SPEC.reference()], ids=["torch", "reference"])
def test_the_order_of_memory_is_kept(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = F.group_norm
    monkeypatch.setattr(
        F, "group_norm", lambda x, *others: on_gpu(x.contiguous(), *others)
    )  # which gives NCHW
    for order in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, 32, 4, 5).contiguous(memory_format=order)
        shift, norm = torch.randn(2, 32), torch.randn(2, 64)
        for y in function(
            x, *norm, shift, None, x, num_groups=4, eps=1e-5, silu=True, return_sum=1
        ):
            assert y.is_contiguous(memory_format=order)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 32, 4, 4)}, "channels-last"),
        ({"x": image(2, 32, 4, 4, dtype=torch.int32)}, "int32"),
        ({"x": image(0, 32, 4, 4)}, "empty shape"),
        ({"x": torch.zeros(2, 32)}, r"images \(B, C, H, W\)"),
        ({"num_groups": 5}, "32 channels in 5 groups"),
        ({"weight": torch.ones(16)}, r"\(32,\) for 32 channels"),
        ({"shift": torch.zeros(16)}, r"a shift of shape \(16,\); takes \(2, 32\) or \(32,\)"),
        ({"residual": image(2, 32, 4, 3)}, "a residual of shape"),
        ({"residual": image(2, 32, 4, 4, dtype=torch.bfloat16)}, "one dtype"),
        ({"skip": image(2, 8, 3, 4)}, "skip of shape"),
        ({"bias": torch.zeros(32, device="meta")}, "one device"),
        ({"num_groups": 0}, "32 channels in 0 groups"),
        ({"num_groups": -4}, "32 channels in -4 groups"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    good = {
        "x": image(2, 32, 4, 4),
        "weight": torch.ones(32),
        "bias": torch.zeros(32),
        "num_groups": 16,
        "eps": 1e-5,
    }
    functions = [kernels.group_norm] if words == "channels-last" else [kernels.group_norm, torchs]
    for function in functions:
        with pytest.raises(KernelError, match=words):
            function(**{**good, **changes})


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A stand-in with the signature of Apex's registered op; the list keeps its calls."""
    calls: list[tuple[Any, ...]] = []

    def group_norm_nhwc_fprop(
        x: torch.Tensor,
        G: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        act: str,
        passes: int,
        use_v2: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((tuple(x.shape), G, eps, act, passes, use_v2))
        y = torch.nn.functional.group_norm(x, G, weight, bias, eps)
        return (torch.nn.functional.silu(y) if act == "silu" else y), torch.zeros(x.shape[0], 2 * G)

    for name in ("apex", "apex.contrib", "apex.contrib.group_norm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(
        torch.ops,
        "apex",
        types.SimpleNamespace(group_norm_nhwc_fprop=group_norm_nhwc_fprop),
        raising=False,
    )
    monkeypatch.delitem(sys.modules, "sd_kernels.group_norm.apex", raising=False)
    yield calls
    sys.modules.pop("sd_kernels.group_norm.apex", None)


def test_apex_is_called_with_its_signature(fake_apex: list[tuple[Any, ...]]) -> None:
    case = CASES["two sources, groups astride"]
    assert all(verdict.ok for verdict in harness.check(SPEC, "apex", case, torch.float32))
    assert fake_apex[0] == ((2, 960, 3, 5), 16, 1e-5, "silu", 1, False)


def test_apex_refuses_what_it_would_hand_to_torch(fake_apex: list[tuple[Any, ...]]) -> None:
    from sd_kernels.group_norm.apex import group_norm

    options = {"weight": torch.ones(96), "bias": torch.zeros(96), "num_groups": 16, "eps": 1e-5}
    with pytest.raises(KernelError, match="no kernel for 96 channels"):
        group_norm(image(1, 96, 2, 2), **options)
    with pytest.raises(KernelError, match="not 8"):
        group_norm(image(1, 96, 2, 2), **{**options, "num_groups": 8})
    with pytest.raises(KernelError, match="256 channels in 0 groups"):
        group_norm(image(1, 256, 2, 2), torch.ones(256), torch.zeros(256), num_groups=0, eps=1e-5)
    with pytest.raises(KernelError, match="dense channels-last memory"):  # pixels apart
        group_norm(
            image(1, 264, 2, 2)[:, :256], torch.ones(256), torch.zeros(256), num_groups=16, eps=1e-5
        )
    assert SPEC.backend("apex").refuses(CASES["nothing added"], torch.bfloat16)
    assert not fake_apex
