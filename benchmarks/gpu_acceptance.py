"""The fast and the plain UNet on a GPU: are they right, how fast are they, where does time go?

    python -m benchmarks.gpu_acceptance --output DIR [--triton-cache FILE] [--earlier FILE]

Parts run one after another, each in a process of its own, until all are done or the seconds are up:
environment, triton_cache, kernels, convolutions, fast (throughput eager and captured), profile,
small_network and full_network (checks), fp8, other_batches, pictures, rivals, compiled. A part that
crashes or hangs costs itself alone. Run the same command again with --earlier, and it goes on where
that report ends. What was timed before its checks are green is marked `unproven`.

Writes DIR/gpu_acceptance.json as results come, and DIR/kernels_<gpu>.json (rows as
kernel_speed.py's), and prints a summary last. Needs torch, Triton and NumPy alone. Without an
install, from the repository root: PYTHONPATH=kernels python -m benchmarks.gpu_acceptance ...
Exit code 0: all is well; 1: something is red or failed; 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.attempts import Ended, run_child
from benchmarks.command import command_parser
from benchmarks.gpu_environment import software
from benchmarks.gpu_parts import PARTS, RESTART, Part
from benchmarks.gpu_report import (
    NAME,
    Findings,
    Report,
    nothing_yet,
    part_line,
    read_findings,
    source_digest,
)
from benchmarks.timing import Budget
from sd_perf.errors import UserError
from sd_perf.files import write_json
from sd_perf.tools.results import REPOSITORY, Provenance

ENVIRONMENT = "environment"
"""the part that runs in every call, and without which none of the others does"""
MODULE = "benchmarks.gpu_parts"


@dataclass
class Run:
    """One call of the script: its parts, its options, and what it found."""

    parts: Sequence[Part]
    options: argparse.Namespace
    budget: Budget
    report: Report
    scratch: Path
    """folder of this call alone: findings of the running part, Triton's cache"""
    module: str = MODULE
    """runs one part: `python -m MODULE NAME --findings FILE ...`"""

    def all_parts(self) -> None:
        """Run what is asked for and not done, in order, each into the report."""
        for part in self.parts:
            before = self.report.parts.get(part.name, nothing_yet(part.name))
            if part.name in self.options.parts and before["status"] != "done":
                print(f"--- {part.name} ({self.budget.left():.0f} s left)", flush=True)
                self._part(part, before)
                print(part_line(self.report.parts[part.name]), flush=True)
            if part.name == ENVIRONMENT:
                if "machine" not in self.report.parts[part.name]["facts"]:
                    self.report.notes.append("No other part ran, since there is no GPU to be seen.")
                    return
                if self.options.earlier:
                    self.report.adopt(self.options.earlier)

    def _part(self, part: Part, before: Findings) -> None:
        """Run one part to its end, in as many processes as it takes."""
        if self.budget.left() < part.least:
            left_out = {**before, "status": "left out", "reason": "no seconds were left for it"}
            self.report.put(left_out)  # type: ignore[arg-type]
            return
        path = self.scratch / f"{part.name}.json"
        write_json(path, before)
        budget = Budget(min(part.most, self.budget.left()))
        aim = Budget(min(part.aim, self.budget.left()))

        def tick() -> None:
            """What the part has found so far is kept, should this process be killed."""
            found = read_findings(path, part.name)
            if found != self.report.parts.get(part.name):
                self.report.put(found)

        while True:
            command = self._command(part, path, max(aim.left(), 0.1))
            ended = run_child(
                command,
                budget.left(),
                folder=REPOSITORY,
                environment=self._environment(),
                tick=tick,
            )
            found = settled(read_findings(path, part.name), ended)
            found["seconds"] = round(before["seconds"] + budget.seconds - budget.left(), 1)
            self.report.put(found)
            if found["status"] != "running":
                return
            write_json(path, found)
            print(f"{part.name} goes on in another process", flush=True)

    def _command(self, part: Part, findings: Path, seconds: float) -> list[str]:
        options = self.options
        capability = self.report.provenance.machine.get("compute_capability", "9.0")
        command = [sys.executable, "-m", self.module, part.name, "--findings", str(findings)]
        command += ["--seconds", f"{seconds:.1f}", "--batch", str(options.batch)]
        command += ["--rival-batch", str(options.rival_batch), "--cache", str(self._cache)]
        command += ["--capability", capability.replace(".", "")]
        command += ["--archive", str(options.triton_cache)] if options.triton_cache else []
        return command + (["--rehearse"] if options.rehearse else [])

    @property
    def _cache(self) -> Path:
        return self.scratch / "triton"

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TRITON_CACHE_DIR": str(self._cache), "PYTHONUNBUFFERED": "1"}


def settled(found: Findings, ended: Ended) -> Findings:
    """Findings after their process has ended; the status stays `running` where another must go on.

    What ended the process is put down to the item that ran, which is not begun again.
    """
    blamed = found["current"]
    if blamed is not None and ended.status != "done":
        found["broken"][blamed] = str(ended.reason)
        found["finished"].append(blamed)
        found["current"] = None
    if ended.status == "done":
        return found
    goes_on = ended.status == "failed" and (blamed is not None or ended.code == RESTART)
    if not goes_on:
        found["status"], found["reason"] = ended.status, ended.reason
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; SystemExit with code 2 where they make no sense."""
    parts = ",".join(part.name for part in PARTS)
    parser = command_parser(NAME, __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder that receives the results")
    add("--triton-cache", type=Path, help="kernels packed by gpu_triton_cache (default: none)")
    add("--earlier", type=Path, help="gpu_acceptance.json of an earlier call, to go on from")
    add("--parts", default=parts, help=f"parts to run (default: {parts})")
    add("--batch", type=int, default=64, help="samples of the fast iteration (default: 64)")
    add("--rival-batch", type=int, default=32, help="samples of the other UNets (default: 32)")
    add("--seconds", type=float, default=540.0, help="time for all parts, s (default: 540)")
    add("--git-sha", help="commit of this tree, where it lies without git (default: ask git)")
    add("--rehearse", action="store_true", help="on this CPU with tiny networks: no results")
    options = parser.parse_args(arguments)
    if min(options.batch, options.rival_batch) < 1:
        parser.error("--batch, --rival-batch: every batch size must be at least 1")
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"--parts: no part is called {unknown[0]!r}; choose from {parts}")
    options.parts.append(ENVIRONMENT)
    for path in filter(None, (options.triton_cache, options.earlier)):
        if not path.is_file():
            parser.error(f"{path}: there is no such file")
    if options.triton_cache:
        options.triton_cache = options.triton_cache.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    budget = Budget(options.seconds)
    if not options.rehearse and not torch.cuda.is_available():
        words = (
            "gpu_acceptance.py measures a CUDA GPU, and torch finds none on this machine "
            "(--rehearse tries the script out on a CPU)."
        )
        print(words, file=sys.stderr)
        return 2
    provenance = Provenance.of_this_run(NAME, {}, software(), options.git_sha)
    if provenance.git_sha is None:
        words = "git does not know the commit of this tree, which results must name; give --git-sha"
        print(words, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output, provenance, source_digest())
    # So that the running part is killed, too; it is in a process group of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(PARTS, options, budget, report, Path(scratch))
        try:
            run.all_parts()
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    report.seconds = round(budget.seconds - budget.left(), 1)
    report.provenance.machine.setdefault("gpu", "could not be asked")
    report.save()
    print(report.summary())
    return int(bool(report.failures()))


if __name__ == "__main__":
    sys.exit(main())
