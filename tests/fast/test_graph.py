"""What can be shown of a graph's capture without a GPU: its order, and its error's words."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sd_perf.errors import UserError
from sd_perf.fast import graph
from sd_perf.fast.graph import Runner, naming_the_operator


class Relu(torch.autograd.Function):
    """Its backward pass does what no capture allows."""

    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        gradient.sort()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_the_operator_that_cannot_be_captured_is_named():
    x = torch.ones(3, requires_grad=True)
    words = r"training\.cuda_graph: aten\.sort\.default cannot be captured in a CUDA graph \("
    with pytest.raises(UserError, match=words) as told, naming_the_operator("training.cuda_graph"):
        Relu.apply(x * 2).sum().backward()
    assert "not permitted when stream is capturing); choose another kernel" in str(told.value)


def test_memory_that_ran_out_is_another_error():
    with pytest.raises(torch.OutOfMemoryError), naming_the_operator("training.cuda_graph"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_a_graph_the_iteration_is_called():
    calls = []
    runner = Runner(lambda: calls.append("iteration"))
    runner.run()
    runner.run()
    assert calls == ["iteration"] * 2


class Broken:
    """A capture whose end fails, too, because an operator within has failed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *failure: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("first", "kind", "words"),
    [
        (RuntimeError("not permitted"), UserError, r"aten\.sort\.default .*\(not permitted\)"),
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError, "2 GiB"),
    ],
)
def test_what_failed_first_is_told(first, kind, words):
    with pytest.raises(kind, match=words), naming_the_operator("training.cuda_graph"), Broken():
        torch.ones(2).sort()
        raise first


def test_compiled_code_is_recorded_as_it_is():
    calls = []

    def backend(module, inputs):
        def compiled(*given):
            calls.append("compiled")
            return module(*given)

        return compiled

    double = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)
    with naming_the_operator("training.cuda_graph"):
        double(torch.ones(2))
    assert calls == ["compiled"]


class Stream:
    """Stands for a CUDA stream."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Graph:
    """Stands for a CUDA graph."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


def test_warm_up_comes_before_the_capture_and_replays_after(monkeypatch):
    log: list[str] = []
    main, side = Stream(log, "main"), Stream(log, "side")

    @contextlib.contextmanager
    def stream(of: Stream):
        log.append(f"on {of.name}")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def capture(iteration):
        log.append("capture")
        return Graph(log)

    monkeypatch.setattr(graph, "capture", capture)
    runner = Runner(lambda: log.append("iteration"))
    runner.warm_up(lambda: log.append("warm-up"))
    runner.capture()
    assert log == [
        "side waits for main",
        "on side",
        "warm-up",
        "back",
        "on side",
        "capture",
        "back",
    ]
    log.clear()
    runner.run()
    runner.close()
    runner.close()
    assert log == ["replay", "reset"]
