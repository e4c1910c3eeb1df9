"""What the parts of `gpu_acceptance` found: read, merged, judged, written and shown."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import sd_kernels
import sd_perf
from benchmarks import gpu_profile, gpu_throughput, kernel_speed
from benchmarks.checks import Check
from benchmarks.gpu_checks import unproven
from benchmarks.gpu_throughput import RECIPES, ThroughputRow
from sd_kernels.registry import all_ops
from sd_perf.files import read_json
from sd_perf.tools.results import KernelRow, Provenance, Result, read, write

NAME = "gpu_acceptance"
DONE = "done"
GOOD_ENDS = (DONE, "partial", "left out")
"""statuses of parts without a failure"""


class Findings(TypedDict):
    """What one part has found so far; a part is a list of items that run one after another."""

    part: str
    status: str
    """`running`, `done`, `partial` (its seconds were up before its last item), `failed`,
    `timed out` (it was killed), or `left out` (it was not begun)"""
    reason: str | None
    seconds: float
    """time that it took, all calls together"""
    finished: list[str]
    """titles of the items that have ended, well or not"""
    current: str | None
    """title of the item that runs; after a crash the one to blame"""
    broken: dict[str, str]
    """what became of each item that ended or hung its process, or broke the GPU's context"""
    facts: dict[str, Any]
    checks: list[Check]
    kernels: list[KernelRow]
    rows: list[ThroughputRow]
    """throughput as it was timed; `Report.rows` says what is proven"""


def nothing_yet(part: str, status: str = "running", reason: str | None = None) -> Findings:
    """Findings of a part that has not found anything."""
    return {
        "part": part,
        "status": status,
        "reason": reason,
        "seconds": 0.0,
        "finished": [],
        "current": None,
        "broken": {},
        "facts": {},
        "checks": [],
        "kernels": [],
        "rows": [],
    }


def read_findings(path: Path, part: str) -> Findings:
    """Findings from the file that a part's process writes; nothing yet where there is none."""
    found: Findings | None = read_json(path)
    return found or nothing_yet(part)


def source_digest() -> str:
    """Digest of all Python sources of the trainer, its kernels and the benchmarks."""
    digest = hashlib.sha256()
    for folder in (sd_perf.__path__[0], sd_kernels.__path__[0], str(Path(__file__).parent)):
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Report:
    """The findings of all parts, of this call and of an earlier one."""

    folder: Path
    """receives gpu_acceptance.json and kernels_<gpu>.json"""
    provenance: Provenance
    source: str
    """`source_digest`; an earlier report counts where it is the same"""
    parts: dict[str, Findings] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    """time that this call took"""

    @property
    def gpu(self) -> str:
        """Name of the GPU as the driver gives it."""
        return str(self.provenance.machine.get("gpu", "unknown GPU"))

    def put(self, findings: Findings) -> None:
        """Keep a part's findings, and write the files."""
        self.parts[findings["part"]] = findings
        facts = findings["facts"]
        if "machine" in facts:
            self.provenance.machine.update(facts["machine"])
            self.provenance.versions.update(facts["versions"])
        if self.provenance.machine:  # a result must say what it was measured on
            self.save()

    def adopt(self, earlier: Path) -> None:
        """Take over the parts of an earlier report of the same sources, GPU and software.

        Otherwise a note says why it does not count. The environment must have been found before.
        """
        if reason := self._against(result := read(earlier, NAME, ThroughputRow)):
            self.notes.append(f"{earlier} does not count: {reason}")
            return
        before: dict[str, Findings] = result.details["parts"]
        self.parts = {**before, **self.parts}

    def _against(self, earlier: Result[ThroughputRow]) -> str:
        """Why an earlier result does not count; empty: it does."""
        theirs = earlier.provenance
        if earlier.details["source"] != self.source:
            return "its sources were others"
        if theirs.machine.get("gpu") != self.gpu:
            return f"it is of {theirs.machine.get('gpu')}, this is {self.gpu}"
        if theirs.versions != self.provenance.versions:
            return f"its software was {theirs.versions}, here it is {self.provenance.versions}"
        return ""

    @property
    def checks(self) -> list[Check]:
        """Checks of networks."""
        return [check for part in self.parts.values() for check in part["checks"]]

    @property
    def kernels(self) -> list[KernelRow]:
        """Rows of kernels and convolutions."""
        return [row for part in self.parts.values() for row in part["kernels"]]

    @property
    def rows(self) -> list[ThroughputRow]:
        """Throughput rows. One that rests on a check that is not green has the status `unproven`.

        Its figures stay, for those who look for what is slow; they are not to be quoted.
        """
        return [self._judged(row) for part in self.parts.values() for row in part["rows"]]

    def _judged(self, row: ThroughputRow) -> ThroughputRow:
        against = self._unproven(row)
        if row["status"] != "measured" or against is None:
            return row
        return {**row, "status": "unproven", "reason": f"unproven: {against}"}

    def _unproven(self, row: ThroughputRow) -> str | None:
        """The first check that the row rests on and that is not green."""
        recipe = RECIPES[row["implementation"].removesuffix("_eager")]
        return self._unproven_kernel(row["kernels"] or {}) or unproven(
            recipe, self.checks, self._groups_done()
        )

    def _unproven_kernel(self, backends: dict[str, str]) -> str | None:
        """The first kernel whose parity is red or unknown. References are what others rest on."""
        for op, backend in backends.items():
            if backend == all_ops()[op].backends[-1].name:
                continue
            mine = [row for row in self.kernels if (row["op"], row["backend"]) == (op, backend)]
            if not mine:
                return f"kernel {op}, {backend} (not compared yet)"
            if not all(row["parity"]["ok"] for row in mine):
                return f"kernel {op}, {backend}"
        return None

    def _groups_done(self) -> set[str]:
        """Titles of the groups of checks that ran to their end."""
        parts = self.parts.values()
        return {
            title for part in parts for title in part["finished"] if title not in part["broken"]
        }

    def result(self) -> Result[ThroughputRow]:
        """The report as it is written."""
        details = {name: getattr(self, name) for name in ("source", "parts", "notes", "seconds")}
        return Result(NAME, self.provenance, self.rows, details)

    def save(self) -> None:
        """Write gpu_acceptance.json, and rows of kernels into a file that can be committed."""
        write(self.folder / f"{NAME}.json", self.result())
        if self.kernels:
            name = re.sub("[^a-z0-9]+", "_", self.gpu.lower())
            result = Result("kernel_speed", self.provenance, self.kernels)
            write(self.folder / f"kernels_{name}.json", result)

    def failures(self) -> list[str]:
        """What went wrong, in words; running out of time or memory is a finding, no failure."""
        ends = [part_line(part) for part in self.parts.values() if not _ended_well(part)]
        red = [check_line(check) for check in self.checks if not check["passed"]]
        kernels = [kernel_speed.row_line(row) for row in self.kernels if kernel_speed.is_bad(row)]
        failed = [row for row in self.rows if row["status"] == "failed"]
        return [*ends, *red, *kernels, *map(gpu_throughput.row_line, failed)]

    def summary(self) -> str:
        """The report as text; what is asked for first comes last, where a terminal shows it."""
        source = self.provenance
        lines = [f"{self.gpu}, torch {source.versions.get('torch')}, {source.date}"]
        lines += map(check_line, self.checks)
        lines += [kernel_speed.row_line(row) for row in self.kernels if row["status"] != "absent"]
        lines += [*map(part_line, self.parts.values()), *self._facts()]
        lines += map(gpu_throughput.row_line, self.rows)
        lines += [f"FAILED {line}" for line in self.failures()]
        return "\n".join(lines + self.notes)

    def _facts(self) -> Iterable[str]:
        for part in self.parts.values():
            for name, value in part["facts"].items():
                if name == "profile":
                    yield from gpu_profile.lines(value)
                elif name not in ("machine", "versions"):
                    yield f"{part['part']}, {name}: {value}"


def _ended_well(part: Findings) -> bool:
    return part["status"] in GOOD_ENDS and not part["broken"]


def part_line(part: Findings) -> str:
    """A part as one line of text."""
    reason = f": {part['reason']}" if part["reason"] else ""
    broken = "".join(f"; {title} {what}" for title, what in part["broken"].items())
    line = f"part {part['part']:15s} {part['status']}{reason}{broken}"
    return f"{line} ({part['seconds']:.0f} s, {len(part['finished'])} items)"


def check_line(check: Check) -> str:
    """A check as one line of text."""
    verdict = "ok " if check["passed"] else "RED"
    error = "      nan" if check["error"] is None else f"{check['error']:9.2e}"
    return f"{verdict} {error} (budget {check['budget']:7.1e})  {check['check']}  {check['note']}"
