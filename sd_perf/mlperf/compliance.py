"""Runs the official compliance checker on an MLPerf log and puts its findings into words."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from sd_perf.errors import DataError
from sd_perf.mlperf.log import import_mlperf, scan_log
from sd_perf.mlperf.notes import faults, notes
from sd_perf.mlperf.rules import CLIP_TARGET, FID_TARGET, RULESET

_SEPARATOR = "-" * 30
"""stands between two findings in the checker's output"""
_COUNTS = {
    "EXACTLY_ONE": "exactly once",
    "AT_LEAST_ONE": "at least once",
    "AT_LEAST(2)": "at least twice",
}
_RULES = {
    "s['init_started']": "init_start must come before it",
    "( s['init_stopped'] == True )": "init_stop must come before it",
    "s['run_started']": "run_start must come before it",
    "not s['init_stopped']": "it must come before init_stop",
    "not s['run_started']": "it must come before run_start",
    "ll.timestamp - s['first_init_start'] < (s['compile_time_mins']*60*1e3)": "initialisation "
    "must take less than 30 minutes in the closed division, 240 in the open one, and "
    "submission_division must come before init_stop",
    "'status' in v['metadata']": "its metadata must hold a status",
}
"""meaning of each test of the checker, which prints it as Python source"""


@dataclass(frozen=True)
class Verdict:
    """The official checker's verdict on a log."""

    path: Path
    passed: bool
    division: str
    """the division that the log declares; empty where it declares none"""
    ruleset: str
    status: str
    """that of run_stop, success or aborted; empty where there is none"""
    findings: tuple[str, ...]
    """a sentence per violation; where the log passed, per warning"""
    notes: tuple[str, ...] = ()
    """a sentence per oddity of a log that passed, which the checker does not look at"""

    def __str__(self) -> str:
        verdict = "passes" if self.passed else "fails"
        division = f"{self.division} division" if self.division else "no division declared"
        text = (
            f"{self.path}: {verdict} the official compliance checker (ruleset {self.ruleset}, "
            f"{division})"
        )
        if self.passed and self.status != "success":
            text += (
                f"; its run_stop says {self.status!r}, so it counts as a run that did not converge"
            )
        kind = "warning: " if self.passed else ""
        findings = [f"  - {kind}{finding}" for finding in self.findings]
        return "\n".join([text, *findings, *(f"  - note: {note}" for note in self.notes)])


def check_log(
    path: Path, division: Literal["closed", "open"] | None = None, ruleset: str = RULESET
) -> Verdict:
    """Run `python -m mlperf_logging.compliance_checker` on a log, as a submitter would.

    Where `division` is given, a log of another division fails. Raises ConfigError where
    mlperf-logging is missing, and DataError where the log is missing or the installed version does
    not know the ruleset.
    """
    checker = Path(str(import_mlperf("compliance_checker").__file__)).parent
    if not (checker / f"training_{ruleset}" / "closed_stable_diffusion.yaml").is_file():
        raise DataError(
            f"ruleset {ruleset}: the installed mlperf-logging has no Stable Diffusion in it; use "
            f"{RULESET}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such MLPerf log")
    events, damaged = scan_log(path)
    causes = [*damaged, *faults(events)]
    passed, findings = _run_checker(path.resolve(), ruleset, causes)
    if not events:
        findings = []  # each key that is missing, one by one
    if not passed:
        findings = [*causes, *findings]
    divisions = (str(event.value) for event in events if event.key == "submission_division")
    stops = (event.metadata.get("status", "") for event in events if event.key == "run_stop")
    declared, status = next(divisions, ""), str(next(stops, ""))
    if division and declared != division:
        passed = False
        findings = [f"the log declares {declared or 'no'} division, not {division}", *findings]
    return Verdict(
        path=path,
        passed=passed,
        division=declared,
        ruleset=ruleset,
        status=status,
        findings=tuple(findings),
        notes=tuple(notes(events)) if passed else (),
    )


def _run_checker(path: Path, ruleset: str, causes: list[str]) -> tuple[bool, list[str]]:
    """Whether the log passed, and the checker's findings in words.

    Where the checker breaks off, `causes` are why, as far as they are known; only without any its
    own last words are a finding.
    """
    with TemporaryDirectory() as folder:
        output = Path(folder) / "checker.log"  # the checker insists on writing one
        options = ["--usage", "training", "--ruleset", ruleset, "--log_output", str(output)]
        command = [sys.executable, "-m", "mlperf_logging.compliance_checker", *options, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    findings = [_in_words(finding) for finding in _findings(text)]
    # Some logs make the checker itself raise: it fails without having printed its verdict.
    if done.returncode and "ERROR - FAILED" not in text and not causes:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        findings.append(f"the checker broke off with {last}")
    return done.returncode == 0, findings


def _findings(text: str) -> list[str]:
    """The checker's findings: the parts of its last warning, separated by lines of dashes.

    The warning before it, of lines that it cannot parse, says what `scan_log` says better.
    """
    text = re.sub(r"^WARNING -  (Found parsing errors:| ).*\n", "", text, flags=re.MULTILINE)
    text = text.replace("Log lines had parsing errors.", "")
    _, _, after = text.partition("WARNING -  ")
    body = re.split(
        r"^(?:ERROR|INFO) - (?:FAILED|SUCCESS)$", after, maxsplit=1, flags=re.MULTILINE
    )[0]
    return [part.strip() for part in body.split(_SEPARATOR) if part.strip()]


def _in_words(finding: str) -> str:
    """One sentence for one finding; its first line where the finding is of no known kind."""
    lines = finding.splitlines()
    count = re.match(r"Required (\S+) occurrence of (.+?)(?: but found (\d+)(.*))?$", finding)
    if count:
        wanted, key, found, more = count.groups()
        key = key.replace("'", "").replace(
            "aggregated_eval_accuracy", "evaluations with both FID and CLIP"
        )
        return f"{key}: must stand {_COUNTS.get(wanted, wanted)}, found {found or 0}{more or ''}"
    if finding.startswith("Failed checks for aggregated_eval_accuracy"):
        return (
            f"no evaluation passes: the target is FID <= {FID_TARGET:g} and CLIP >= {CLIP_TARGET:g}"
        )
    failed = re.match(r"CHECK for '(\S+)' failed", finding)
    if failed:
        tests = (line for line in lines if line.startswith("failed test: "))
        test = next(tests, "?").removeprefix("failed test: ")
        value = re.search(r'"value": (.+?), "metadata"', finding)
        return (
            f"{failed[1]} = {value[1] if value else '?'}: "
            f"{_RULES.get(test.strip(), f'breaks the rule {test.strip()}')}"
        )
    if finding.startswith("Failed executing"):
        return f"the checker could not apply a rule: {' '.join(lines[:2])}"
    return lines[0]
