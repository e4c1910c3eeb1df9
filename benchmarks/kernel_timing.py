"""Time of one candidate on a GPU, forward and backward, in CUDA graphs.

A graph holds enough calls to outlast the gap between two replays. They rotate through sets of
inputs larger than the L2 cache, so that no call finds its inputs there. A candidate whose parity is
red is not timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.attempts import attempt, release_memory
from benchmarks.gpu_device import Device
from benchmarks.kernel_cases import Candidate, Direction
from benchmarks.kernel_parity import ParityChecker
from benchmarks.timing import repetitions, timed
from sd_kernels.spec import Function, Inputs

Call = Callable[[], Any]

PARAMETERS = ("weight", "bias")
"""inputs whose gradients wgrad computes"""
GRAPH_SECONDS = 5e-4
"""least duration of a graph; the gap between two replays, some microseconds, is lost in it"""
MOST_INPUT_SETS = 32


def input_sets(candidate: Candidate, l2_bytes: int, device: str) -> list[dict[str, Any]]:
    """Inputs by name, drawn anew in each set: enough sets to fill the L2 cache twice.

    At most `MOST_INPUT_SETS`: tiny inputs fit the cache all the same.
    """

    def inputs(seed: int) -> dict[str, Any]:
        made = Inputs(candidate.case, candidate.dtype, device, seed=seed)
        return candidate.spec.inputs(candidate.case, made)

    first = inputs(0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(first).values())
    count = min(MOST_INPUT_SETS, -(-2 * l2_bytes // size))
    return [first, *map(inputs, range(1, count))]


def _tensors(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def forwards(function: Function, sets: list[dict[str, Any]]) -> list[Call]:
    """A forward call for each set of inputs."""
    return [partial(function, **inputs) for inputs in sets]


def backwards(
    function: Function, sets: list[dict[str, Any]], direction: Direction = "backward"
) -> list[Call]:
    """A backward call for each set of inputs; the forwards run now and keep what they saved.

    For dgrad the parameters, and for wgrad everything else, are detached: an op skips the gradient
    of an input that requires none.
    """
    calls: list[Call] = []
    for given in sets:
        unwanted = {
            name: tensor.detach()
            for name, tensor in _tensors(given).items()
            if direction != "backward" and (direction == "wgrad") != (name in PARAMETERS)
        }
        inputs = given | unwanted
        results = function(**inputs)
        results = results if isinstance(results, tuple) else (results,)
        outputs = [out for out in results if out.requires_grad]
        call = partial(
            torch.autograd.grad,
            outputs,
            [tensor for tensor in _tensors(inputs).values() if tensor.requires_grad],
            [torch.randn_like(out) for out in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        calls.append(call)
    return calls


def capture(calls: list[Call], count: int, device: str) -> Callable[[], None]:
    """Capture `count` of the calls, in turns, as one CUDA graph; returns what replays it.

    Captures on the current stream, which must not be the default one. On a CPU what is returned
    makes the calls.
    """
    for _ in range(3):
        calls[0]()  # compiles, loads, and creates what libraries keep
    kept: dict[int, Any] = {}  # each set's output keeps memory of its own, as its inputs do

    def run() -> None:
        for number, call in enumerate(islice(cycle(calls), count)):
            kept[number % len(calls)] = call()

    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def time_direction(
    candidate: Candidate,
    direction: Direction,
    calls: list[Call],
    copy_rate: float,
    seconds: float,
    device: Device,
) -> dict[str, Any]:
    """Columns of a measured `KernelRow`, from about `seconds` of replays.

    copy_rate: bytes per second of a device copy. It tells how many calls fill a graph, since hardly
    a call moves its bytes faster than a copy does.
    """
    moved = candidate.moved_bytes(direction)
    turns = max(1, math.ceil(GRAPH_SECONDS * copy_rate / (moved * len(calls))))
    graph_calls = len(calls) * turns
    replay = capture(calls, graph_calls, device.name)
    once = statistics.median(timed(replay, 3, device.clock())) / 1000
    replays = repetitions(seconds, once, least=5, most=500)
    us = 1000 * statistics.median(timed(replay, replays, device.clock())) / graph_calls
    rate = moved / us * 1e6
    return {
        "status": "measured",
        "us": us,
        "gb_per_second": rate / 1e9,
        "percent_of_copy": 100 * rate / copy_rate,
        "tflop_per_second": candidate.flops(direction) / us / 1e6,
        "input_sets": len(calls),
        "graph_calls": graph_calls,
        "replays": replays,
    }


def measure(
    candidate: Candidate,
    checker: ParityChecker,
    copy_rate: float,
    l2_bytes: int,
    seconds: float,
    device: Device,
) -> dict[str, dict[str, Any]]:
    """Columns of a `KernelRow` by direction: status, parity, and where that is green the speed.

    copy_rate in bytes per second; seconds of replays for each direction. Runs on a side stream.
    """
    function = candidate.function()
    parity = checker.check(candidate, function)
    if not parity["ok"]:
        red = {"status": "red", "reason": parity["worst"], "parity": parity}
        return dict.fromkeys(candidate.directions(), red)

    def on_side_stream(direction: Direction) -> dict[str, Any]:
        with device.side_stream():
            sets = input_sets(candidate, l2_bytes, device.name)
            calls = (
                forwards(function, sets)
                if direction == "forward"
                else backwards(function, sets, direction)
            )
            return time_direction(
                candidate, direction, calls, copy_rate=copy_rate, seconds=seconds, device=device
            )

    measured: dict[str, dict[str, Any]] = {}
    for direction in candidate.directions():
        measured[direction] = {"parity": parity, **attempt(partial(on_side_stream, direction))}
        attempt(release_memory)
    return measured
