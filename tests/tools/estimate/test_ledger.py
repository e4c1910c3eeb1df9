"""The traced step: its sums, its agreement with the estimate, what a captured step may not do."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sd_kernels.launch import recording
from sd_perf.cli import main
from sd_perf.config import Config, PrecisionConfig, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.tools.estimate.ledger import ledger
from sd_perf.tools.estimate.ledger_operators import moved_by
from sd_perf.tools.estimate.ledger_page import ledger_tables
from sd_perf.tools.estimate.ledger_recorder import FakeGPU, Recorder, WaitingError
from sd_perf.tools.estimate.predict import predict
from tests.kernels.attention_fakes import install

ROOT = Path(__file__).parents[3]
SHALLOW = Config(
    model=UNetConfig(channel_mult=(2, 1), attention_resolutions=(2,), num_res_blocks=1)
)
BATCH = 64
LAUNCHES, GIGABYTES, COPIED = 1100, 5.45, 0.15
"""the goals of a step and of a sample; and what torch's attention, which writes dq, dk and dv
apart, costs a sample beyond"""


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return ledger(Config(), "h100", BATCH)


@pytest.fixture(scope="module")
def packed() -> tuple[dict[str, Any], dict[str, Any]]:
    """Ledger and estimate where an attention is installed that writes packed gradients."""
    with pytest.MonkeyPatch.context() as patch:
        install("cudnn_graph", patch)
        return ledger(Config(), "h100", BATCH), predict(Config(), "h100", BATCH)["installed"]


def test_the_step_of_the_benchmark(benchmark: dict[str, Any], packed: Any) -> None:
    assert 1000 < packed[0]["launches"] < benchmark["launches"] <= LAUNCHES
    assert 5.0 < packed[0]["gigabytes_per_sample"] <= GIGABYTES
    assert benchmark["gigabytes_per_sample"] <= GIGABYTES + COPIED
    # One launch updates all weights: 26 bytes a parameter, and the padding between parameters.
    optimizer = benchmark["phases"]["optimizer"]
    moved = optimizer["read"] + optimizer["written"]
    assert moved == pytest.approx(26 * 865_910_724, rel=1e-4)


def test_floor_and_causes_are_the_whole(benchmark: dict[str, Any]) -> None:
    total = benchmark["read"] + benchmark["written"]
    floor = sum(row["floor"] for row in benchmark["ops"].values())
    assert floor + sum(row["bytes"] for row in benchmark["causes"]) == pytest.approx(total)
    launches = sum(row["launches"] for row in (*benchmark["ops"].values(), *benchmark["causes"]))
    assert launches == benchmark["launches"]
    for rows in (benchmark["phases"].values(), benchmark["kernels"]):
        assert sum(row["launches"] for row in rows) == benchmark["launches"]
        assert sum(row["read"] + row["written"] for row in rows) == pytest.approx(total)


def test_the_estimate_is_the_ledger_op_by_op(benchmark: dict[str, Any], packed: Any) -> None:
    _require_the_same(benchmark, predict(Config(), "h100", BATCH)["installed"])
    assert packed[1]["attention"] == "cudnn_graph"
    _require_the_same(*packed)


def _require_the_same(benchmark: dict[str, Any], installed: dict[str, Any]) -> None:
    estimated = installed["by_op"]
    found = {op: row["bytes"] for op, row in benchmark["ops"].items()}
    # What torch moves between the ops; what lies inside them has no launch of its own.
    found["elementwise"] = sum(
        row["bytes"]
        for row in benchmark["causes"]
        if row["launches"] and "inside" not in row["cause"]
    )
    assert found.keys() == estimated.keys()
    for op, moved in found.items():
        ours = estimated[op]["gigabytes"] * BATCH
        # A hundredth of a gigabyte of a step is 3 microseconds.
        assert ours == pytest.approx(moved / 1e9, rel=0.02, abs=0.01), op


def test_a_small_step_by_hand() -> None:
    found = ledger(SHALLOW, "h100", 2)
    rows = [row for row in found["kernels"] if row["op"] == "linear" and not row["cause"]]
    assert {row["kernel"] for row in rows} == {"mm", "addmm"}
    forward = sum(row["launches"] for row in rows if row["phase"] == "forward")
    backward = sum(row["launches"] for row in rows if row["phase"] == "backward")
    # Neither text nor timesteps take a gradient: their matmuls have one matmul in backward.
    assert backward == 2 * forward - 2
    # 32 x 32 tokens of 320 channels: 12C forward and 20C backward, of 2 bytes, in 2 samples.
    rows = [row for row in found["kernels"] if row["kernel"].startswith("geglu")]
    calls, one = rows[0]["launches"], 2 * (32 * 32) * 320 * 2
    assert found["ops"]["geglu"]["floor"] == calls * one * (12 + 20)
    split = {
        row["phase"]: (row["read"] / one / calls, row["written"] / one / calls) for row in rows
    }
    # Beside the tokens: a bias of 8C, and in backward its gradient in parts, one for each program.
    assert split["forward"] == (pytest.approx(8, rel=0.01), 4)
    assert split["backward"][0] == pytest.approx(12, rel=0.01)
    assert 8 <= split["backward"][1] < 9


def test_the_documented_ledger_is_that_of_the_code(benchmark: dict[str, Any]) -> None:
    facts = {"gpu": "h100", "batch": BATCH, "ledger": benchmark}
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(*ledger_tables(facts), sep="\n")
    shown = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert f"--ledger`:\n\n```\n{shown}\n```\n" in page, f"docs/performance.md lacks:\n{shown}"


def recorded(step: Callable[[], Any]) -> list[Any]:
    with recording() as launches, FakeGPU():
        recorder = Recorder(launches)
        with recorder.step():
            step()
    return recorder.entries


def on_gpu(*shape: int, **options: Any) -> Tensor:
    return torch.empty(shape, device="cuda", **options)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (lambda: on_gpu(3).sum().item(), "aten._local_scalar_dense .* makes the host wait"),
        (lambda: bool(on_gpu(1)[0] > 0), "aten._local_scalar_dense"),
        (lambda: on_gpu(3).nonzero(), "aten.nonzero"),
        (lambda: on_gpu(3)[on_gpu(3) > 0], "aten.index"),
        (lambda: torch.tensor(3.0, device="cuda"), "aten.tensor .* from the host"),
        (lambda: on_gpu(3).copy_(torch.ones(3)), "aten.copy_ .* from the host"),
        (lambda: on_gpu(3) * torch.tensor(2.0), "aten.mul .* from the host"),
        (lambda: torch.ones(3).to("cuda"), "aten._to_copy .* from the host"),
        (lambda: on_gpu(3).to("cpu"), "aten._to_copy .* from the host"),
    ],
)
def test_what_a_captured_step_may_not_do(step: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(WaitingError, match=sentence):
        recorded(step)


def test_the_host_may_do_its_own() -> None:
    assert recorded(lambda: float(torch.ones(3).sum())) is not None
    assert recorded(lambda: on_gpu(3).device.type == "cuda" or 1 / 0) == []


def test_bytes_of_torchs_operators() -> None:
    image = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}

    def step() -> None:
        bias = on_gpu(8)
        on_gpu(4, 8).add_(bias.expand(4, 8))  # reads 32 + 8, writes 32
        on_gpu(4, 8).copy_(on_gpu(4, 8).t().contiguous().t())  # twice: reads 32, writes 32
        on_gpu(4, 8).t().view(8, 4).unsqueeze(0)  # views move nothing
        x = on_gpu(2, 16, 4, 4, **image).requires_grad_()
        weight = on_gpu(8, 16, 3, 3, **image).requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.backward(on_gpu(*y.shape, **image))

    entries = recorded(step)
    moved = [(entry.kernel, entry.moved.read, entry.moved.written) for entry in entries]
    x, w, y = 2 * 16 * 16 * 2, 8 * 16 * 9 * 2, 2 * 8 * 16 * 2
    assert moved == [
        ("add_", 4 * 40, 4 * 32),
        ("clone", 4 * 32, 4 * 32),
        ("copy_", 4 * 32, 4 * 32),
        ("convolution", x + w, y),
        ("convolution_backward.dgrad", y + w, x),
        ("convolution_backward.wgrad", y + x, w),
    ]


def test_launches_of_foreach() -> None:
    """At most 64 pairs of tensors and 320 blocks of 65,536 elements in one launch."""

    def launches(*sizes: int) -> int:
        tensors = [torch.empty(size, device="meta") for size in sizes]
        call = torch.ops.aten._foreach_copy_.default
        [moved] = moved_by(call, (tensors, tensors), {}, None)
        assert moved.read == moved.written == 4 * sum(sizes)
        return moved.launches

    assert launches(*[1] * 64) == 1
    assert launches(*[1] * 65) == 2
    assert launches(320 * 65536) == 1
    assert launches(320 * 65536 + 1) == 2


def test_a_step_that_waits_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = FusedDiffusionStep.forward

    def waiting(self: Any, *arguments: Any) -> Tensor:
        loss = whole(self, *arguments)
        assert loss.item() >= 0
        return loss

    monkeypatch.setattr(FusedDiffusionStep, "forward", waiting)
    smoke = str(ROOT / "configs/smoke.yaml")
    with pytest.raises(SystemExit) as left:
        main(["estimate", "--config", smoke, "--batch", "2", "--ledger"])
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("sd-perf: aten._local_scalar_dense in ") and "makes the host wait" in line
    )


def test_layers_in_fp8_are_refused() -> None:
    fast = replace(SHALLOW.model, implementation="fast")
    fp8 = Config(model=fast, precision=PrecisionConfig(linear="fp8_native"))
    with pytest.raises(ConfigError, match=r"precision\.linear.*bf16, since the ledger traces"):
        ledger(fp8, "h100", 2)


@pytest.mark.slow
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "estimate",
        "--config",
        str(ROOT / "configs/smoke.yaml"),
        "--batch",
        "2",
        "--ledger",
    ]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    assert set(found["phases"]) == {"forward", "backward", "reduce", "optimizer"}
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    page = capsys.readouterr().out
    assert "beyond the floor, by cause" in page and "weights packed for one matmul" in page
    assert str(found["launches"]) in page


def test_kernels_that_are_named_are_those_that_are_traced() -> None:
    named = replace(SHALLOW, kernels=replace(SHALLOW.kernels, attention="flash_sdpa"))
    kernels = {row["kernel"] for row in ledger(named, "h100", 2)["kernels"]}
    assert "_scaled_dot_product_flash_attention" in kernels
    assert not any("cudnn" in kernel for kernel in kernels)
