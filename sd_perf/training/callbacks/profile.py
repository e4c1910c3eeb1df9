"""A trace of a few steps and a table of their hottest operators, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from sd_perf.fast.ops import Op
from sd_perf.files import disk_errors, write_text, written_aside
from sd_perf.runs.checkpoints import MAKE_ROOM
from sd_perf.training.callbacks.base import Callback, TrainerView

FOLDER = "profile"
"""in the run folder"""
_HOTTEST = 40
"""operators in a table"""
_TOLD = 12
"""lines of the table that are printed"""
_OF_OURS = "sd_kernels."
"""how names of the operators of sd_kernels begin; kernels that torch knows begin sd_kernels::"""
_HISTORY = 100_000
"""allocations of GPU memory whose origin is kept, for the snapshot where memory runs out"""


class ProfileSteps(Callback):
    """Records profile.steps on the main rank; comes first, so that a step begins and ends with it.

    On a GPU a recorded step has a synchronization at its two ends. What a CUDA graph runs is
    recorded as kernels, without the operators that they were captured from.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._profiler: torch.profiler.profile | None = None
        self._first = 0

    def on_start(self, trainer: TrainerView) -> None:
        first, end = trainer.config.profile.first_and_end
        if not trainer.world.is_main:
            return
        total = trainer.config.steps_of(trainer.config.training.max_samples)
        if first < trainer.steps or first >= total:
            why = f"the run goes from step {trainer.steps:,} to {total:,}"
            self._tell(f"profile.steps: step {first:,} does not come ({why}); nothing is recorded")
            return
        self._tell(f"profile.steps: steps {first:,} to {end - 1:,} are recorded, and are slower")
        if trainer.world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    def before_step(self, trainer: TrainerView) -> None:
        if trainer.world.is_main and trainer.steps == trainer.config.profile.first_and_end[0]:
            activities = [ProfilerActivity.CPU]
            if trainer.world.device.type == "cuda":
                torch.cuda.synchronize()
                activities.append(ProfilerActivity.CUDA)
            self._first = trainer.steps
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def on_step(self, trainer: TrainerView) -> None:
        if trainer.is_over or trainer.steps >= trainer.config.profile.first_and_end[1]:
            self._conclude(trainer)

    def on_end(self, trainer: TrainerView) -> None:
        self._conclude(trainer)  # the run was asked to stop amid the steps

    def close(self, trainer: TrainerView) -> None:
        if self._profiler:  # an exception has come between: what was recorded is no whole step
            self._profiler.stop()
            self._profiler = None

    def _conclude(self, trainer: TrainerView) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
        name = f"steps_{self._first:06d}_{trainer.steps:06d}"
        trace = trainer.folder / FOLDER / f"{name}.trace.json"
        table = trace.with_name(f"{name}.txt")
        with disk_errors(trace, MAKE_ROOM):
            trace.parent.mkdir(exist_ok=True)
            with written_aside(trace) as draft:
                profiler.export_chrome_trace(str(draft))
            lines = hottest(profiler.key_averages(), trainer.steps - self._first)
            write_text(table, "\n".join(lines) + "\n")
        self._tell(f"profile.steps: {trace} (open in ui.perfetto.dev), {table}")
        for line in lines[:_TOLD]:
            self._tell(line)


def named_in_profile(name: str, op: Op) -> Op:
    """An operator of sd_kernels that a profile shows by its name, whichever backend it is of."""

    def call(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(_OF_OURS + name):
            return op(*arguments, **options)

    return call


def hottest(events: Any, steps: int) -> list[str]:
    """Lines of two tables: the operators of sd_kernels, and what takes the time in the end.

    `events` are torch's averages by name. The first has the calls of the forward pass and of the
    optimizer, with all that they call; where a CUDA graph runs there are none. The second has
    operators by the time in themselves, backward pass and all. Times are of the GPU where any of it
    was recorded, else of the CPU, in milliseconds per step.
    """
    on_gpu = any(event.self_device_time_total for event in events)
    time, own_time = "cpu_time_total", "self_cpu_time_total"
    if on_gpu:
        time, own_time = "device_time_total", "self_device_time_total"
    ours = [event for event in events if event.key.startswith(_OF_OURS)]
    others = [event for event in events if not event.key.startswith(_OF_OURS)]
    whole = sum(getattr(event, own_time) for event in events) or 1
    head = f"{'ms/step':>10} {'share':>7} {'calls/step':>11}  "
    where = f"({'GPU' if on_gpu else 'CPU'}, {steps} step{'s' if steps > 1 else ''})"
    return [
        *([f"{head}operator of sd_kernels, backward pass left out {where}"] if ours else []),
        *_rows(ours, time, whole, steps),
        f"{head}operator, without what it calls {where}",
        *_rows(others, own_time, whole, steps),
    ]


def _rows(events: Any, time: str, whole: float, steps: int) -> list[str]:
    """A line per event that took time, the hottest first; `time` is its field, microseconds."""
    timed = [(getattr(event, time), event.count, event.key) for event in events]
    timed = sorted((row for row in timed if row[0] > 0), reverse=True)[:_HOTTEST]
    return [
        f"{spent / 1000 / steps:10.3f} {100 * spent / whole:6.1f}% {count / steps:11.1f}  {name}"
        for spent, count, name in timed
    ]
