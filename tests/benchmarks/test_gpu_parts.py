"""Parts of the acceptance run: their items, and what becomes of one that fails, hangs or breaks."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_parts
from benchmarks.gpu_device import Device, Rehearsal
from benchmarks.gpu_parts import PARTS, RESTART, Item, Job, run_items
from benchmarks.gpu_report import nothing_yet, read_findings
from benchmarks.timing import Budget
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow

OPTIONS = ["kernels", "--batch", "2", "--rival-batch", "2", "--rehearse"]


def job(folder: Path, device: Device | None = None, seconds: float = 10 * PATIENCE) -> Job:
    options = gpu_parts.parse([*OPTIONS, "--findings", str(folder / "findings.json")])
    options.cache = folder / "cache"
    return Job(device or Rehearsal(), Budget(seconds), options, nothing_yet("part"))


def test_items_are_saved_as_they_end(tmp_path: Path) -> None:
    mine = job(tmp_path)
    seen: list[Any] = []

    def look() -> None:
        found = read_findings(mine.options.findings, "part")
        seen.append((found["current"], found["finished"], found["status"]))

    assert run_items(mine, [Item("a", look), Item("b", look)], item_most=PATIENCE) == 0
    assert seen == [("a", [], "running"), ("b", ["a"], "running")]
    assert read_findings(mine.options.findings, "part")["status"] == "done"


def test_an_item_that_raises_costs_itself_alone(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no kernel")

    mine, ran = job(tmp_path), []
    items = [Item("bad", fail), Item("good", lambda: ran.append("good"))]
    assert run_items(mine, items, item_most=PATIENCE) == 0
    assert ran == ["good"]
    assert mine.findings["broken"] == {"bad": "no kernel"}
    assert mine.findings["finished"] == ["bad", "good"]
    # A process that goes on begins nothing again.
    assert run_items(mine, items, item_most=PATIENCE) == 0
    assert ran == ["good"]


def test_a_broken_context_needs_another_process(tmp_path: Path) -> None:
    class Broken(Rehearsal):
        def require_sound(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    mine, ran = job(tmp_path, Broken()), []
    items = [Item(name, lambda: ran.append(1)) for name in ("a", "b")]
    assert run_items(mine, items, item_most=PATIENCE) == RESTART
    assert len(ran) == 1
    saved = read_findings(mine.options.findings, "part")
    assert saved["status"] == "running" and saved["finished"] == ["a"]
    assert saved["broken"]["a"].startswith("broke the GPU's context: an illegal memory access")


def test_an_item_that_hangs_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given_up = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        given_up.set()

    monkeypatch.setattr(os, "_exit", leave)
    mine = job(tmp_path)
    mine.findings["current"] = "slow"
    with gpu_parts.watched(mine, 0.05):
        assert given_up.wait(PATIENCE)
    assert codes == [RESTART]
    saved = read_findings(mine.options.findings, "part")
    assert saved["broken"] == {"slow": "hung for 0 s"} and saved["finished"] == ["slow"]
    assert "test_an_item_that_hangs" in capfd.readouterr().err  # where it hung


def test_an_item_that_ends_is_watched_no_more(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with gpu_parts.watched(job(tmp_path), 2 * PATIENCE):
        [watch] = set(threading.enumerate()) - before
        assert watch.is_alive()
    watch.join(PATIENCE)
    assert not watch.is_alive()


def test_time_that_is_up_leaves_items_for_the_next_call(tmp_path: Path) -> None:
    mine, ran = job(tmp_path, seconds=PATIENCE), []
    items = [
        Item("short", lambda: ran.append("short")),
        Item("long", lambda: ran.append("long"), least=2 * PATIENCE),
    ]
    assert run_items(mine, items, item_most=PATIENCE) == 0
    assert ran == ["short"]
    assert mine.findings["status"] == "partial"
    assert mine.findings["reason"] == "1 of 2 items left when its seconds were up"


def items_of(name: str, folder: Path) -> tuple[Job, list[Item]]:
    [part] = [each for each in PARTS if each.name == name]
    mine = job(folder)
    return mine, list(part.items(mine))


def test_group_norm_comes_first_and_no_reference_is_compiled(tmp_path: Path) -> None:
    _, items = items_of("kernels", tmp_path)
    titles = [item.title for item in items]
    assert titles[0].startswith("group_norm") and titles[0].endswith("triton")
    backends = [title.rsplit(", ", 1)[1] for title in titles]
    assert backends.count("triton") == backends[:8].count("triton") == 8
    assert "torch.compile" not in backends
    assert set(backends[-10:]) == {"reference"}


def test_every_convolution_is_measured_in_each_direction(tmp_path: Path) -> None:
    mine, items = items_of("convolutions", tmp_path)
    assert len(items) == 22 and len({item.title for item in items}) == 22
    items[0].run()
    assert [row["direction"] for row in mine.findings["kernels"]] == ["forward", "dgrad", "wgrad"]


@pytest.mark.parametrize("name", ["environment", "profile", "fp8"])
def test_a_part_on_a_cpu(name: str, tmp_path: Path) -> None:
    mine, items = items_of(name, tmp_path)
    assert run_items(mine, items, item_most=PATIENCE) == 0
    found = mine.findings
    assert found["status"] == "done" and not found["broken"]
    if name == "environment":
        assert found["facts"]["versions"]["torch"]
    elif name == "profile":
        assert found["facts"]["profile"]["status"] == "measured"
    else:
        [row] = found["rows"]
        assert (row["implementation"], row["status"], row["batch"]) == ("fast_fp8", "measured", 2)


def test_a_part_is_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line of a part goes on from its findings."""
    monkeypatch.setattr(gpu_parts, "set_arithmetic", lambda timing: None)
    monkeypatch.setattr(gpu_parts, "end_with_parent", lambda parent: None)
    path = tmp_path / "findings.json"
    arguments = ["environment", "--findings", str(path), "--rehearse", "--seconds", "600"]
    for _ in range(2):
        assert gpu_parts.main(arguments) == 0
        assert read_findings(path, "environment")["finished"] == ["description", "ceilings"]


def test_times_leave_room_for_options() -> None:
    options = gpu_parts.parse(["fast", "--findings", "x"])
    assert isinstance(options, argparse.Namespace) and options.batch == 64
    assert options.batches == [8, 16, 32]


def test_the_arithmetic_that_was_set_can_be_read() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    try:
        gpu_parts.set_arithmetic(timing=False)
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic) == (False, False, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before
