"""The profile of a fast iteration: which op a kernel belongs to, and what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_profile
from benchmarks.gpu_device import Rehearsal
from benchmarks.gpu_fast import FAST_BF16, FastWorkload
from sd_kernels.registry import all_ops
from tests.benchmarks.tiny import SIZES, TINY


@dataclass
class FakeEvent:
    """As much of a profiler's event as is read."""

    name: str
    cpu_parent: FakeEvent | None
    sequence_nr: int
    scope: int
    kernels: list[Any]
    time_range: Any


def event(
    start: float,
    name: str,
    parent: FakeEvent | None = None,
    *kernels: tuple[str, float],
    sequence_nr: int = -1,
    scope: int = 0,
) -> FakeEvent:
    """kernels: names and microseconds."""
    launched = [SimpleNamespace(name=name, duration=us) for name, us in kernels]
    return FakeEvent(name, parent, sequence_nr, scope, launched, SimpleNamespace(start=start))


def forward_events() -> list[FakeEvent]:
    conv = event(1, "sd_perf op conv", None, ("sd_perf op conv", 999.0))  # the range's own copy
    made = event(2, "aten::convolution", conv, sequence_nr=7)
    cudnn = event(3, "aten::cudnn_convolution", made, ("implicit_gemm", 2000.0))
    cat = event(4, "aten::cat", None, ("cat", 100.0), sequence_nr=8)
    norm = event(5, "sd_perf op group_norm")
    # It takes no gradient, so that node 9 is of what follows.
    empty = event(6, "aten::empty", norm, sequence_nr=9)
    linear = event(7, "sd_perf op linear")
    product = event(8, "aten::addmm", linear, ("gemm", 300.0), sequence_nr=9)
    return [conv, made, cudnn, cat, norm, empty, linear, product]


def backward_events() -> list[FakeEvent]:
    engine = "autograd::engine::evaluate_function:"
    conv = event(10, f"{engine} ConvolutionBackward0", sequence_nr=7)
    node = event(11, "ConvolutionBackward0", conv, sequence_nr=7, scope=1)
    inner = ("wgrad", 1500.0), ("wgrad", 500.0)
    backward = event(12, "aten::convolution_backward", node, *inner)
    summed = event(13, "aten::add_", conv, ("add", 50.0))  # of two gradients of one tensor
    linear = event(13.5, f"{engine} AddmmBackward0", sequence_nr=9)
    other = event(14, "AddmmBackward0", linear, sequence_nr=9, scope=1)
    custom = event(15, "sd_kernels::layer_norm_backward", other, ("ln", 70.0))
    product = event(16, "aten::mm", other, ("gemm", 600.0))
    column = event(17, "sd_kernels::column_sum", custom, ("column_sum", 30.0))
    return [conv, node, backward, summed, linear, other, custom, product, column]


def test_kernels_are_grouped_by_where_they_were_launched() -> None:
    *earlier, product, column = [*forward_events(), *backward_events()]
    found = gpu_profile.by_op([*reversed(earlier), product, column])
    assert {op: (round(row["ms"], 3), row["kernels"]) for op, row in found.items()} == {
        "conv": (4.0, 3),
        "linear": (0.9, 2),
        "elementwise": (0.15, 2),
        "layer_norm": (0.1, 2),
    }
    assert found["conv"]["longest"] == {"implicit_gemm": 2.0, "wgrad": 2.0}

    rows = gpu_profile.compare(found, {"conv": 1.0, "linear": 0.8, "adamw": 7.5})
    assert [row["op"] for row in rows] == ["conv", "elementwise", "layer_norm", "linear", "adamw"]
    assert [row["ratio"] for row in rows] == [4.0, None, None, pytest.approx(1.125), 0.0]
    text = gpu_profile.lines({"status": "measured", "recipe": "fast", "batch": 64, "ops": rows})
    assert text[2].split() == ["conv", "4.00", "1.00", "4.00", "+3.00", "3"]
    assert text[-1].split() == ["sum", "5.15", "9.30", "0.55", "-4.15"]
    assert gpu_profile.lines({"status": "failed", "reason": "odd"}) == ["profile: failed: odd"]


def test_every_operator_is_found_in_a_real_profile() -> None:
    """Events of a CPU have no kernels: here what an event itself takes stands for them."""

    events = gpu_profile.profile(FAST_BF16, 2, Rehearsal())
    found = gpu_profile.by_op(events, gpu_profile.host_times)
    ops = set(gpu_profile.by_op(events, lambda event: [("", 1.0)]))
    workload = FastWorkload(FAST_BF16, TINY, 2, "cpu", **SIZES)
    workload.iteration()
    assert ops == {*workload.kernels, "collect_gradients", "elementwise"}
    assert set(all_ops()) - ops == {"fp8_linear"}

    def kernels(part: str) -> set[str]:
        only = gpu_profile.by_op(
            events, lambda event: gpu_profile.host_times(event) if part in event.name else []
        )
        return set(only)

    assert kernels("aten::convolution_backward") == {"conv", "upsample_conv"}
    assert kernels("native_layer_norm_backward") == {"layer_norm"}
    assert kernels("gelu_backward") == {"geglu"}
    assert kernels("attention_for_cpu_backward") == {"attention"}
    assert kernels("mse_loss_backward") == {"v_mse_loss"}
    assert "adamw" in kernels("aten::sqrt")
    assert kernels("_foreach_copy_") == {"collect_gradients"}
    assert found["linear"]["ms"] > 0
