"""Delayed scaling of `fp8_linear`: what kernels record, and how scales follow from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sd_kernels import harness, launch
from sd_kernels.errors import KernelError
from sd_kernels.fp8_linear import SPEC
from sd_kernels.fp8_linear.delayed_kernels import (
    fp8_geglu_backward,
    fp8_layer_norm,
    fp8_update_scales,
)
from sd_kernels.fp8_linear.delayed_scaling import DelayedScaling
from sd_kernels.fp8_linear.quantise import fp8_quantise_delayed
from sd_kernels.fp8_linear.reference import fp8_linear as reference
from sd_kernels.fp8_linear.reference import quantise
from sd_kernels.fp8_linear.scaling import (
    FORMATS,
    FORWARD,
    GRADIENT,
    HISTORY,
    SLOTS,
    Scales,
    update_scales,
)
from sd_kernels.fp8_linear.triton import fp8_linear
from sd_kernels.geglu.reference import geglu
from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import BATCH, transformers
from sd_kernels.spec import Case, Inputs

PAGE = (Path(__file__).parents[2] / "docs/fast_unet.md").read_text(encoding="utf-8")
DELAYED = [case for case in SPEC.small_cases if case.extras.delayed]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_transposed(transposed: torch.Tensor, numbers: torch.Tensor) -> None:
    """It is the transpose, with zeros for the rows beyond the last."""
    rows = len(numbers)
    assert transposed.shape == (numbers.shape[1], -(-rows // 16) * 16)
    assert torch.equal(bits(transposed[:, :rows]), bits(numbers.t()))
    assert not transposed[:, rows:].float().any()


@pytest.mark.slow
@pytest.mark.parametrize("case", DELAYED, ids=lambda case: case.name)
def test_each_slot_records_its_tensor(case: Case) -> None:
    """What the kernels record is what the reference records, and a second pass changes nothing."""
    recorded = []
    for function in (fp8_linear, reference):
        inputs = SPEC.inputs(case, Inputs(case, torch.bfloat16))
        scales = inputs["scales"]
        before = scales.inverse.clone()
        harness.evaluate(SPEC, function, inputs)
        once = scales.amax.clone()
        harness.evaluate(SPEC, function, inputs)
        assert torch.equal(scales.amax, once) and torch.equal(scales.inverse, before)
        recorded.append(once)
    assert len(set(recorded[0].tolist())) == len(recorded[0])
    assert recorded[0].tolist() == pytest.approx(recorded[1].tolist(), rel=0.02)


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
@pytest.mark.parametrize("inverse", [1e-5, 0.013, 40.0])
def test_numbers_equal_plain_torch(dtype: torch.dtype, inverse: float) -> None:
    """Also where the scale is too large, so that numbers saturate."""
    x, scale = normal(150, 80), scalar(inverse)
    seen, expected_seen = scalar(0.0), scalar(0.0)
    numbers, transposed, sums = fp8_quantise_delayed(x, dtype, scale, seen, with_sums=True)
    expected, _ = quantise(x, dtype, Scales(scale[None], expected_seen[None]))
    assert torch.equal(bits(numbers), bits(expected))
    assert_transposed(transposed, numbers)
    assert seen == expected_seen == x.abs().max()
    assert torch.allclose(sums.sum(0), x.sum(0), atol=1e-4)
    assert fp8_quantise_delayed(x, dtype, scale, seen)[2].numel() == 0


def test_largest_magnitudes_only_grow_and_nan_is_the_largest() -> None:
    seen = scalar(7.0)
    fp8_quantise_delayed(torch.ones(16, 16), FORWARD, scalar(1.0), seen)
    assert seen == 7.0
    for number in (float("inf"), float("nan"), 1.0):
        x = torch.ones(16, 16)
        x[3, 4] = number
        numbers, *_ = fp8_quantise_delayed(x, FORWARD, scalar(1.0), seen)
        assert numbers[3, 4].float().isnan() == (number != number)
    assert seen.isnan()


@pytest.mark.parametrize("width", [64, 320, 1280, 2000])
@pytest.mark.parametrize("with_residual", [True, False])
def test_layer_norm_writes_fp8(width: int, with_residual: bool) -> None:
    x, weight, bias = normal(37, width), normal(width, seed=1), normal(width, seed=2)
    residual = normal(37, width, seed=3) if with_residual else None
    seen = scalar(0.0)
    numbers, transposed, summed, mean, rstd = fp8_layer_norm(
        x, weight, bias, residual, 1e-5, scalar(1 / 32), seen
    )
    total = x if residual is None else x + residual
    exact = F.layer_norm(total.double(), (width,), weight.double(), bias.double())
    assert seen.item() == pytest.approx(exact.abs().max().item(), rel=1e-5)
    # E4M3 keeps three bits after the first: half of the last is 2^-4 of the number.
    assert ((numbers.double() / 32 - exact).abs() <= exact.abs() / 16 + 2.0**-10 / 32).all()
    assert_transposed(transposed, numbers)
    assert torch.allclose(mean, total.mean(1), atol=1e-5)
    assert torch.allclose(rstd, (total.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-4)
    assert torch.equal(summed, total) if with_residual else summed.numel() == 0


def test_rows_beyond_the_last_are_not_recorded() -> None:
    """They would be the bias, which here is larger than every normalised number."""
    x, bias = torch.ones(1, 64), torch.zeros(64)
    x[0, 0], bias[0] = -1.0, 9.0
    seen = scalar(0.0)
    fp8_layer_norm(x, torch.ones(64), bias, None, 1e-5, scalar(1.0), seen)
    assert seen.item() == pytest.approx((F.layer_norm(x, (64,)) + bias).abs().max().item())
    assert seen < 9.0


def test_gradient_of_geglu_is_written_in_fp8() -> None:
    x, dy, seen = normal(70, 160).requires_grad_(), normal(70, 80, seed=1), scalar(0.0)
    (exact,) = torch.autograd.grad(geglu(x.double()), x, dy.double())
    numbers, transposed, sums = fp8_geglu_backward(x.detach(), dy, scalar(2.0**-10), seen, True)
    assert seen.item() == pytest.approx(exact.abs().max().item(), rel=1e-5)
    # E5M2 keeps two bits after the first.
    assert ((numbers.float() / 2**10 - exact).abs() <= exact.abs() / 8 + 2.0**-27).all()
    assert_transposed(transposed, numbers)
    assert torch.allclose(sums.sum(0), exact.sum(0), atol=1e-4)


def new_state(slots: int = SLOTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(slots), torch.ones(slots), torch.zeros(HISTORY, slots)


def after(*steps: float, update: Any = update_scales) -> torch.Tensor:
    """Inverse scales of a layer whose three tensors had these largest magnitudes."""
    amax, inverse, history = new_state()
    for magnitude in steps:
        amax.fill_(magnitude)
        update(amax, inverse, history)
        assert not amax.any()
    return inverse


UPDATES = pytest.mark.parametrize("update", [update_scales, fp8_update_scales])


@UPDATES
def test_scales_follow_the_rules_of_transformer_engine(update: Any) -> None:

    def scales_of(magnitude: float) -> torch.Tensor:
        largest = torch.tensor([FORMATS[FORWARD], FORMATS[FORWARD], FORMATS[GRADIENT]])
        return torch.full((SLOTS,), magnitude) / largest

    assert torch.equal(after(3.0, update=update), scales_of(3.0))
    assert torch.equal(after(3.0, 1.0, update=update), scales_of(3.0))
    # The last HISTORY steps count, this one among them.
    assert torch.equal(after(3.0, *[1.0] * (HISTORY - 1), update=update), scales_of(3.0))
    assert torch.equal(after(3.0, *[1.0] * HISTORY, update=update), scales_of(1.0))
    # Nothing seen: the scale is 1 at first, and stays what it was later.
    assert torch.equal(after(0.0, update=update), torch.ones(SLOTS))
    assert torch.equal(after(3.0, *[0.0] * HISTORY, update=update), scales_of(3.0))
    # What is not finite holds the scale as long as the history has it.
    for broken in (float("inf"), float("nan")):
        assert torch.equal(after(3.0, broken, 5.0, update=update), scales_of(3.0))
        assert torch.equal(after(broken, *[5.0] * HISTORY, update=update), scales_of(5.0))
    # A scale is finite whatever it is of.
    assert (1.0 / after(1e-44, update=update)).isfinite().all()


def test_the_kernel_updates_as_plain_torch() -> None:
    """Bit for bit, with more slots than a program has and magnitudes of every kind."""
    slots, generator = 130 * SLOTS, torch.Generator().manual_seed(4)
    ours, torchs = new_state(slots), new_state(slots)
    kinds = torch.tensor([0.0, float("inf"), float("nan"), 1e-43, 3e38])
    for _ in range(HISTORY + 5):
        magnitudes = 10.0 ** (8 * torch.randn(slots, generator=generator)).clamp(-37, 37)
        rare = torch.rand(slots, generator=generator) < 0.02
        kind = kinds[torch.randint(len(kinds), (slots,), generator=generator)]
        for state in (ours, torchs):
            state[0].copy_(torch.where(rare, kind, magnitudes))
        before = launch.executed["update_scales_kernel"]
        fp8_update_scales(*ours)
        assert launch.executed["update_scales_kernel"] == before + 1
        update_scales(*torchs)
        for our, expected in zip(ours, torchs, strict=True):
            assert torch.equal(our.view(torch.int32), expected.view(torch.int32))


def test_a_network_has_its_scales_in_three_tensors() -> None:
    scaling = DelayedScaling()
    assert [scaling.add_layers(count) for count in (1, 2, 1)] == [0, 1, 3]
    assert scaling.amax.shape == (12,) and scaling.history.shape == (HISTORY, 12)
    assert not scaling.state_dict()
    scaling.of(1, 2).amax[4] = 6.0
    assert scaling.amax.nonzero().tolist() == [[7]] and scaling.of(2).amax[1] == 6.0
    scaling.update()
    assert scaling.of(2).inverse[1] == 6.0 / FORMATS[FORWARD]
    # Weights change their dtype without the scales.
    before, state = scaling.inverse.clone(), scaling.state()
    scaling.to(torch.bfloat16)
    assert scaling.inverse.dtype == torch.float32 and torch.equal(scaling.inverse, before)
    # A state is a copy, and is restored in place.
    address = scaling.inverse.data_ptr()
    scaling.inverse.fill_(3.0)
    scaling.load_state(state)
    assert torch.equal(scaling.inverse, before) and scaling.inverse.data_ptr() == address
    other = DelayedScaling()
    other.add_layers(1)
    with pytest.raises(KernelError, match=r"precision_state: got .*\(12,\).* takes .*\(3,\)"):
        other.load_state(state)


def gigabytes(op: str, calls: Any) -> float:
    """Of a step's calls of an op, forward and backward; `calls` says how often a case is called."""
    spec = all_ops()[op]
    works = [(calls(case), spec.work(case, torch.bfloat16)) for case in spec.cases]
    return sum(count * (work.forward_bytes + work.backward_bytes) for count, work in works) / 1e9


def test_a_feed_forward_moves_what_its_page_says() -> None:
    """The table of docs/fast_unet.md, from the specs."""
    layers = Counter((layer.side**2, layer.channels) for layer in transformers())

    def feed_forward(case: Case) -> int:
        L, N = case.sizes("L", "N")
        is_fused = case.options["producer"] == "feed_forward"
        return layers[L, N] if is_fused and case.extras.delayed else 0

    def by_layers(case: Case) -> int:
        L, K, N = case.sizes("L", "K", "N")
        is_inner = (L, K) in layers and N == 8 * K
        return case.calls if is_inner or case.options["producer"] == "geglu" else 0

    # The gradients of both biases read those of the outputs once more.
    biases = sum(2 * BATCH * L * 9 * C * calls for (L, C), calls in layers.items()) / 1e9
    bf16 = gigabytes("linear", lambda case: case.calls * case.name.startswith("feed-forward"))
    bf16 += gigabytes("geglu", lambda case: case.calls) + biases
    bf16 += gigabytes("layer_norm", lambda case: case.calls / 2 * case.extras.residual)
    current = gigabytes("fp8_linear", by_layers) + biases
    delayed = gigabytes("fp8_linear", feed_forward)
    row = "| bytes of all feed-forwards, forward and backward | {:.1f} GB | {:.1f} GB | {:.1f} GB |"
    assert row.format(bf16, current, delayed) in PAGE


def test_scales_of_another_number_of_layers_are_refused() -> None:
    x, weight = torch.zeros(4, 32).bfloat16(), torch.zeros(16, 32).bfloat16()
    scales = Scales(torch.ones(6), torch.zeros(6))
    with pytest.raises(KernelError, match=r"inverse of shape \(6,\).*\(3,\) float32"):
        fp8_linear(x, weight, scales=scales)
    norm, inner = (torch.ones(32).bfloat16(),) * 2, torch.zeros(64, 32).bfloat16()
    tensors = x, weight, None, None, *norm, inner
    with pytest.raises(KernelError, match="no scales; takes scales for a feed-forward"):
        fp8_linear(*tensors, producer="feed_forward")
    with pytest.raises(KernelError, match=r"inner_weight of shape \(80, 32\)"):
        wide = torch.zeros(80, 32).bfloat16()
        fp8_linear(*tensors[:-1], wide, producer="feed_forward", scales=scales)


def test_a_step_that_has_ended_cannot_be_continued_backward() -> None:
    """The scales in memory are then no longer those of the saved numbers: torch says so."""
    x, weight = normal(16, 32).bfloat16().requires_grad_(), normal(16, 32).bfloat16()
    scaling = DelayedScaling()
    scaling.add_layers(1)
    y = fp8_linear(x, weight, scales=scaling.of(0))
    scaling.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
