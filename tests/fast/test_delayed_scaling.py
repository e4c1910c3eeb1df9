"""The fast UNet's delayed scales: what a step records, what outlives it, what leaves no trace."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from sd_kernels.errors import KernelError
from sd_kernels.fp8_linear.scaling import SLOTS
from sd_perf.config import LINEAR_LAYERS, PrecisionConfig
from sd_perf.fast.linear import (
    amax_buffer,
    load_precision_state,
    precision_state,
    update_scales,
)
from sd_perf.fast.unet import FastUNet
from tests.fast.test_precision import (
    CONTEXT,
    REFERENCE,
    TRANSFORMERS,
    assert_alike,
    bf16_results,
    errors,
    fast_unet,
    plain_unet,
    results,
    with_roundings,
)
from tests.fast.test_unet import largest_difference

FEED_FORWARD = PrecisionConfig(feed_forward="fp8_native", fp8_recipe="delayed")
EVERYTHING = PrecisionConfig(linear="fp8_native", fp8_recipe="delayed")


def amax_of(unet: torch.nn.Module) -> torch.Tensor:
    amax = amax_buffer(unet)
    assert amax is not None
    return amax


def after_a_step(unet: FastUNet, side: int = 4) -> FastUNet:
    """The UNet with the scales that one step gave it."""
    bf16_results(unet, side)
    update_scales(unet)
    return unet


@pytest.mark.parametrize(
    ("precision", "layers"),
    [(FEED_FORWARD, 2 * TRANSFORMERS), (EVERYTHING, 8 * TRANSFORMERS + 1)],
    ids=["feed-forward", "everything"],
)
def test_every_layer_has_its_slots(precision: PrecisionConfig, layers: int) -> None:
    unet = fast_unet(precision)
    assert list(unet.state_dict()) == list(plain_unet().state_dict())
    amax = amax_of(unet)
    assert amax.shape == (SLOTS * layers,) and amax.dtype == torch.float32 and not amax.any()
    bf16_results(unet)
    assert amax_of(unet) is amax and (amax > 0).all()
    update_scales(unet)
    assert amax_of(unet) is amax and not amax.any()
    state = precision_state(unet)
    assert set(state) == {f"delayed_scaling.{name}" for name in ("amax", "inverse", "history")}
    assert (state["delayed_scaling.inverse"] != 1.0).all()


def test_nothing_is_kept_without_delayed_scaling() -> None:
    unet = fast_unet(PrecisionConfig(linear="fp8_native"))
    assert amax_buffer(unet) is None and precision_state(unet) == {}
    update_scales(unet)


@pytest.mark.parametrize(
    ("precision", "classes"),
    [(FEED_FORWARD, ("feed_forward",)), (EVERYTHING, LINEAR_LAYERS)],
    ids=["feed-forward", "everything"],
)
def test_rounds_what_fp8_rounds(precision: PrecisionConfig, classes: tuple[str, ...]) -> None:
    """Once the scales are known, errors are those of scales from the step's own values."""
    unet = after_a_step(fast_unet(precision), side=8)
    assert_alike(errors(unet), errors(with_roundings(plain_unet(), classes)))


def test_is_the_plain_one_where_nothing_is_rounded() -> None:
    unet = fast_unet(FEED_FORWARD).double()
    exact = results(plain_unet().double(), torch.float64, 4, CONTEXT)
    assert largest_difference(results(unet, torch.float64, 4, CONTEXT), exact) < 1e-10
    assert not amax_of(unet).any()


@pytest.mark.slow
def test_runs_on_the_fp8_kernels() -> None:
    unet, twin = (
        after_a_step(fast_unet(FEED_FORWARD, replace(REFERENCE, fp8_linear=backend)))
        for backend in ("triton", "reference")
    )
    # Both took a first step with scales of 1, in which gradients this small become zero.
    ours, theirs = (
        state["delayed_scaling.inverse"] for state in map(precision_state, (unet, twin))
    )
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=0.1)
    assert_alike(errors(unet, side=4), errors(twin, side=4))


def test_a_step_keeps_its_scales() -> None:
    """Micro-batches are rounded alike, and the largest magnitude of all of them counts."""
    unet = after_a_step(fast_unet(FEED_FORWARD))
    first, second = bf16_results(unet), bf16_results(unet)
    assert all(map(torch.equal, first, second))
    small = amax_of(unet).clone()
    bf16_results(unet, side=8)
    assert (amax_of(unet) >= small).all() and not torch.equal(amax_of(unet), small)


def test_ranks_that_share_magnitudes_have_the_scales_of_one() -> None:
    """Two ranks with a batch each, whose magnitudes are reduced with MAX, and one with both."""
    first, second, alone = (fast_unet(FEED_FORWARD) for _ in range(3))
    bf16_results(first), bf16_results(second, side=8)
    bf16_results(alone), bf16_results(alone, side=8)
    reduced = torch.maximum(amax_of(first), amax_of(second))
    assert not torch.equal(reduced, amax_of(first)) and not torch.equal(reduced, amax_of(second))
    for rank in (first, second):
        amax_of(rank).copy_(reduced)
        update_scales(rank)
    update_scales(alone)
    for rank in (first, second):
        states = precision_state(rank), precision_state(alone)
        assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_computing_again_records_nothing_new() -> None:
    kept, again = (
        after_a_step(fast_unet(EVERYTHING, activation_checkpointing=recompute))
        for recompute in (False, True)
    )
    assert all(map(torch.equal, bf16_results(kept), bf16_results(again)))
    assert torch.equal(amax_of(kept), amax_of(again))
    for state in map(precision_state, (kept, again)):
        assert all(map(torch.equal, state.values(), precision_state(kept).values()))


def test_warm_up_leaves_no_trace() -> None:
    unet, twin = (after_a_step(fast_unet(FEED_FORWARD)) for _ in range(2))
    tensors = dict(unet.named_buffers())
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    state = precision_state(unet)
    for _ in range(3):
        after_a_step(unet, side=8)
    assert not torch.equal(amax_of(unet), state["delayed_scaling.amax"]) or not all(
        torch.equal(tensor, state[name]) for name, tensor in precision_state(unet).items()
    )
    load_precision_state(unet, state)
    assert {name: tensor.data_ptr() for name, tensor in unet.named_buffers()} == addresses
    for _ in range(2):
        assert all(map(torch.equal, bf16_results(unet), bf16_results(twin)))
        update_scales(unet), update_scales(twin)
    assert all(map(torch.equal, precision_state(unet).values(), precision_state(twin).values()))


def test_a_copy_has_scales_of_its_own() -> None:
    unet = after_a_step(fast_unet(FEED_FORWARD))
    before, other = precision_state(unet), copy.deepcopy(unet)
    expected = bf16_results(unet)
    load_precision_state(unet, before)
    assert all(map(torch.equal, bf16_results(other), expected))
    update_scales(other)
    assert amax_of(other) is not amax_of(unet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in precision_state(unet).items())


@pytest.mark.parametrize("change", ["fewer", "other names"])
def test_scales_of_another_network_are_refused(change: str) -> None:
    unet: Any = fast_unet(FEED_FORWARD)
    state = precision_state(unet)
    if change == "fewer":
        state = precision_state(fast_unet(EVERYTHING))
    else:
        del state["delayed_scaling.history"]
    with pytest.raises(KernelError, match="precision_state: got delayed scales"):
        load_precision_state(unet, state)
