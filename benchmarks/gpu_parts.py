"""The parts of `gpu_acceptance`: what each does, item by item, in a process of its own.

    python -m benchmarks.gpu_parts NAME --findings FILE [options]

The process runs the items that FILE does not have yet, and writes FILE after each. It ends with
`RESTART` where an item hangs or breaks the GPU's context; `gpu_acceptance` then starts another
process, which goes on with the next item. By hand this runs one part to its end or first crash.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_pictures, gpu_profile, gpu_throughput, gpu_triton_cache, kernel_speed
from benchmarks.attempts import attempt, release_memory
from benchmarks.checks import guarded
from benchmarks.command import command_parser
from benchmarks.gpu_checks import Group, full_network, small_network
from benchmarks.gpu_device import Device, Rehearsal
from benchmarks.gpu_environment import software
from benchmarks.gpu_fast import FAST_BF16
from benchmarks.gpu_report import DONE, Findings, read_findings
from benchmarks.gpu_throughput import ALGORITHMS, TimedRecipe
from benchmarks.kernel_cases import Candidate, plan
from benchmarks.kernel_parity import ParityChecker
from benchmarks.timing import Budget
from sd_kernels.targets import Target
from sd_perf.children import end_with_parent
from sd_perf.errors import ConfigError
from sd_perf.files import one_line, write_json

RESTART = 75
"""exit code: the rest of the items needs another process"""
CONVOLUTIONS = ("conv", "upsample_conv")


class Item(NamedTuple):
    """One thing that a part does; it leaves what it found in `Job.findings`."""

    title: str
    run: Callable[[], None]
    least: float = 0.0
    """seconds that must be left for it to be begun"""


@dataclass
class Job:
    """A part at work: what it runs on, how long, and where its findings go."""

    device: Device
    budget: Budget
    options: argparse.Namespace
    findings: Findings

    def save(self) -> None:
        """Write the findings where `gpu_acceptance` reads them."""
        write_json(self.options.findings, self.findings)

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second of a copy within the device's memory."""
        return self.device.copy_rate()


@dataclass(frozen=True)
class Part:
    """A part and its times, in seconds."""

    name: str
    items: Callable[[Job], Sequence[Item]]
    aim: float
    """no item is begun after so long"""
    most: float
    """its process is killed after so long"""
    item_most: float
    """a single item that takes so long hangs; its process is given up, and the next goes on"""
    least: float = 10.0
    """it is not begun with less left"""
    timing: bool = True
    """whether cuDNN takes the fastest convolutions; else those that repeat bit for bit"""


def environment(job: Job) -> list[Item]:
    """GPU, driver and software; the rates of a copy and of a matmul."""
    facts = job.findings["facts"]

    def describe() -> None:
        facts.update(machine=job.device.describe(), versions=software())

    def ceilings() -> None:
        facts.update(job.device.ceilings())

    return [Item("description", describe), Item("ceilings", ceilings)]


def triton_cache(job: Job) -> list[Item]:
    """Put packed kernels into Triton's cache, and compile those that it lacks."""
    facts, options = job.findings["facts"], job.options

    def unpack() -> None:
        if options.archive:
            facts["archive"] = gpu_triton_cache.unpack(options.archive, options.cache)

    def prepare() -> None:
        counts = {"kernels": 0, "found": 0, "compiled": 0}
        facts.update(counts=counts, not_compiled=[])
        work = (options.cache, job.device.triton_ops(), options.capability)
        for kernel in gpu_triton_cache.prepare(*work, gpu_triton_cache.processes()):
            counts["kernels"] += 1
            counts["found" if kernel.found else "compiled"] += not kernel.error
            if kernel.error:
                facts["not_compiled"].append(f"{kernel.op}: {kernel.error}")
        print(f"Triton kernels: {counts}, {len(facts['not_compiled'])} not compiled", flush=True)

    return [Item("unpack", unpack), Item("prepare", prepare)]


def kernels(job: Job) -> list[Item]:
    """The heaviest call of each operator by each backend: Triton first, GroupNorm before all."""

    def order(candidate: Candidate) -> tuple[bool, bool, bool]:
        spec, backend = candidate.spec, candidate.backend
        return backend != spec.ours, spec.name != "group_norm", backend == spec.backends[-1].name

    candidates = plan(Target.here(), heaviest_only=True, compiled=False, batch=job.options.batch)
    alone = [each for each in candidates if each.spec.name not in CONVOLUTIONS]
    return _kernel_items(job, sorted(alone, key=order), ParityChecker(job.device.name, few=True))


def convolutions(job: Job) -> list[Item]:
    """Every shape of convolution in a step, forward, dgrad and wgrad, the heaviest first."""
    every = plan(Target.here(), CONVOLUTIONS, compiled=False, batch=job.options.batch)
    ours = [each for each in every if each.backend == each.spec.backends[0].name]
    ours.sort(key=lambda each: -each.case.calls * each.flops("forward"))
    # On cases of their own size float64 would take longer than all else; the check of the full
    # network compares their sum.
    return _kernel_items(job, ours, ParityChecker(job.device.name, few=True, own=False))


def _kernel_items(job: Job, candidates: Sequence[Candidate], checker: ParityChecker) -> list[Item]:
    def measure(candidate: Candidate) -> None:
        job.findings["kernels"] += kernel_speed.run(
            [candidate],
            job.budget,
            seconds=kernel_speed.QUICK_SECONDS,
            save=lambda rows: None,
            device=job.device,
            checker=checker,
            copy_rate=job.copy_rate,
            algorithms=ALGORITHMS,
        )

    def item(candidate: Candidate) -> Item:
        sized = replace(candidate, case=job.device.sized(candidate.spec, candidate.case))
        title = f"{candidate.spec.name}, {candidate.case.name}, {candidate.backend}"
        return Item(title, partial(measure, sized))

    return [item(candidate) for candidate in candidates]


def timed(entries: Callable[[argparse.Namespace], list[TimedRecipe]], job: Job) -> list[Item]:
    """Throughput of each entry."""

    def measure(entry: TimedRecipe) -> None:
        measure_one = partial(gpu_throughput.measure, device=job.device)
        job.findings["rows"] += gpu_throughput.measure_rows(
            job.device.gpu(), [entry], job.budget, measure_one, save=lambda rows: None
        )

    return [
        Item(entry.title, partial(measure, entry), entry.least_seconds)
        for entry in entries(job.options)
    ]


def profile(job: Job) -> list[Item]:
    """One fast iteration by operator, measured and predicted."""

    def measure() -> None:
        gpu, batch = job.device.gpu(), job.options.batch
        known = gpu_throughput.predictions(gpu, batch).get(FAST_BF16.estimated_as, {})
        predicted = {
            op: batch * figures["ms_per_sample"] for op, figures in known.get("by_op", {}).items()
        }
        table = gpu_profile.measure_profile(FAST_BF16, batch, predicted, job.device)
        job.findings["facts"]["profile"] = table
        print("\n".join(gpu_profile.lines(table)), flush=True)

    return [Item("profile", measure)]


def checked(groups: Callable[[Device], list[Group]], job: Job) -> list[Item]:
    """Each group of checks; one that raises is one red check."""

    def check(group: Group) -> None:
        checks = guarded(group.what, group.run, recipe=group.recipe)
        job.findings["checks"] += checks
        red = sum(not check["passed"] for check in checks)
        print(f"checked: {group.title}: {len(checks) - red} green, {red} red", flush=True)

    return [Item(group.title, partial(check, group)) for group in groups(job.device)]


def _of_batch(entries: Callable[[int], list[TimedRecipe]]) -> Callable[[Job], list[Item]]:
    return partial(timed, lambda options: entries(options.batch))


def _of_rival_batch(entries: Callable[[int], list[TimedRecipe]]) -> Callable[[Job], list[Item]]:
    return partial(timed, lambda options: entries(options.rival_batch))


def pictures(job: Job) -> list[Item]:
    """Pictures by DALI on the device: are they the portable loader's, and how many a second?"""
    try:
        gpu_pictures.require_packages()
    except ConfigError as error:
        job.findings["facts"]["absent"] = str(error)
        return []

    def rates() -> None:
        job.findings["facts"]["pictures per second"] = gpu_pictures.measure_rates(job.device)

    return [*checked(gpu_pictures.groups, job), Item("rates", rates)]


_OTHERS = partial(timed, lambda options: gpu_throughput.other_batches(options.batches))
PARTS = (
    Part("environment", environment, aim=15, most=60, item_most=40),
    Part("triton_cache", triton_cache, aim=60, most=120, item_most=110),
    Part("kernels", kernels, aim=40, most=110, item_most=25),
    Part("convolutions", convolutions, aim=60, most=110, item_most=25),
    Part("fast", _of_batch(gpu_throughput.fast), aim=100, most=170, item_most=110),
    Part("profile", profile, aim=40, most=120, item_most=110),
    Part("small_network", partial(checked, small_network), 100, 200, 90, timing=False),
    Part("full_network", partial(checked, full_network), 90, 180, 120, timing=False),
    Part("fp8", _of_batch(gpu_throughput.fp8), aim=45, most=90, item_most=85),
    Part("other_batches", _OTHERS, aim=110, most=180, item_most=60),
    Part("pictures", pictures, aim=60, most=120, item_most=60),
    Part("rivals", _of_rival_batch(gpu_throughput.rivals), aim=150, most=220, item_most=60),
    Part("compiled", _of_rival_batch(gpu_throughput.compiled), 180, 260, 130, least=90),
)
"""in the order in which they run"""


def set_arithmetic(timing: bool) -> None:
    """Switch TF32 off, and set how cuDNN chooses convolutions; see `Part.timing`."""
    # Not by `fp32_precision`: after that torch, and Inductor, may no longer read these.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = not timing


def run_items(job: Job, items: Sequence[Item], item_most: float) -> int:
    """Run what the findings do not have yet; returns the exit code."""
    findings = job.findings
    waiting = [item for item in items if item.title not in findings["finished"]]
    for done, item in enumerate(waiting):
        if job.budget.left() <= item.least:
            left = f"{len(waiting) - done} of {len(items)} items left when its seconds were up"
            findings["status"], findings["reason"] = "partial", left
            break
        findings["current"] = item.title
        job.save()
        try:
            with watched(job, item_most):
                item.run()
        except Exception as error:  # the other items are worth having
            traceback.print_exc()
            findings["broken"][item.title] = one_line(error)
        findings["finished"].append(item.title)
        findings["current"] = None
        attempt(release_memory)
        try:
            job.device.require_sound()
        except RuntimeError as error:
            findings["broken"].setdefault(item.title, f"broke the GPU's context: {one_line(error)}")
            job.save()
            return RESTART
        job.save()
    else:
        findings["status"] = DONE
    job.save()
    return 0


@contextmanager
def watched(job: Job, seconds: float) -> Iterator[None]:
    """Give up this process where the block takes longer; what waits for a GPU cannot be stopped."""

    def give_up() -> None:
        faulthandler.dump_traceback(all_threads=True)
        findings, title = job.findings, str(job.findings["current"])
        findings["broken"][title] = f"hung for {seconds:.0f} s"
        findings["finished"].append(title)
        findings["current"] = None
        job.save()
        os._exit(RESTART)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = command_parser("gpu_parts", __doc__)
    add = parser.add_argument
    add("name", choices=[part.name for part in PARTS])
    add("--findings", type=Path, required=True, help="JSON file, read first and then replaced")
    add("--seconds", type=float, help="no item is begun after so long (default: the part's own)")
    add("--batch", type=int, default=64, help="samples (default: 64)")
    add("--batches", type=int, nargs="+", default=[8, 16, 32], help="the part other_batches")
    add("--rival-batch", type=int, default=32, help="samples of other networks (default: 32)")
    add("--capability", type=int, default=90, help="of this GPU; 90 for 9.0 (default)")
    add("--archive", type=Path, help="packed Triton kernels (gpu_triton_cache)")
    add("--cache", type=Path, default=Path("build/triton_cache"), help="Triton's cache folder")
    add("--rehearse", action="store_true", help="on this CPU, with tiny networks")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run a part; returns the exit code."""
    options = parse(arguments)
    [part] = [each for each in PARTS if each.name == options.name]
    device = Rehearsal() if options.rehearse else Device()
    budget = Budget(options.seconds or part.aim)
    findings: Any = read_findings(options.findings, part.name)
    findings.update(status="running", reason=None)
    job = Job(device, budget, options, findings)
    set_arithmetic(part.timing)
    # An orphan would hold the GPU, and slow what is measured after it.
    end_with_parent(os.getppid())
    return run_items(job, part.items(job), part.item_most)


if __name__ == "__main__":
    sys.exit(main())
