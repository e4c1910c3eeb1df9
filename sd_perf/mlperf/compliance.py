"""Runs the official compliance checker on an MLPerf log and puts its findings into words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sd_perf.errors import DataError
from sd_perf.mlperf.findings import in_words
from sd_perf.mlperf.log import Event, import_mlperf, scan_log
from sd_perf.mlperf.notes import faults, notes
from sd_perf.mlperf.official import OfficialToolError, call, require_ruleset
from sd_perf.mlperf.rules import RULESET
from sd_perf.mlperf.rulesets import ruleset_of

Division = Literal["closed", "open"]


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
    why_ruleset: str = ""
    """why the log was checked by this one, where nobody named it"""

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
        lines = [text]
        if self.why_ruleset and self.ruleset != RULESET:
            why = f"ruleset {self.ruleset}, because {self.why_ruleset}; --ruleset names another"
            lines.append(f"  - {why}")
        kind = "warning: " if self.passed else ""
        lines += [f"  - {kind}{finding}" for finding in self.findings]
        return "\n".join([*lines, *(f"  - note: {note}" for note in self.notes)])


def check_log(
    path: Path,
    division: Division | None = None,
    ruleset: str | None = RULESET,
    werror: bool = False,
) -> Verdict:
    """The verdict of mlperf-logging's compliance checker on a log.

    Where `division` is given, a log of another division fails. With no ruleset, that of the log's
    round is taken (`ruleset_of`). `werror` makes the checker's warnings errors. Raises ConfigError
    where mlperf-logging is missing, and DataError where the log is missing or the installed version
    does not know the ruleset.
    """
    why = ""
    if ruleset is not None:
        require_ruleset(ruleset)
    if not path.is_file():
        raise DataError(f"{path}: no such MLPerf log")
    events, damaged = scan_log(path)
    if ruleset is None:
        ruleset, why = ruleset_of(events)
        require_ruleset(ruleset)
    mend = (f"{damage}; mend the line or remove it" for damage in damaged)
    causes = [*mend, *(faults(events, ruleset) if events or not damaged else [])]
    passed, findings = _official(path, ruleset, werror, events, causes)
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
        findings=tuple(dict.fromkeys(findings)),
        notes=tuple(notes(events)) if passed else (),
        why_ruleset=why,
    )


def _official(
    path: Path, ruleset: str, werror: bool, events: list[Event], causes: list[str]
) -> tuple[bool, list[str]]:
    """Whether the log passed, and the checker's findings in words.

    Where the checker breaks off, `causes` are why, as far as they are known; only without any its
    own last words are a finding.
    """
    module = import_mlperf("compliance_checker.mlp_compliance")
    module.enqueued_configs.clear()  # a checker that broke off leaves its own there
    checker = module.make_checker("training", ruleset, quiet=False, werror=werror)
    broke = ""
    try:
        common = f"training_{ruleset}/common.yaml"
        passed = bool(call(checker.check_file, str(path), common))
    except OfficialToolError as error:
        passed, broke = False, str(error)
    messages = [
        *checker.warnings.values(),
        *checker.overwritable.values(),
        *checker.not_overwritable,
    ]
    numbers = _checkers_numbers(path)
    findings = [
        in_words(message, events, numbers)
        for message in messages
        if not (causes and _is_told_better(message))
    ]
    if broke and not causes:
        findings.append(f"the checker broke off with {broke}")
    return passed, findings


def _is_told_better(message: str) -> bool:
    """Whether `scan_log` and `faults` say the same with line and remedy."""
    keys = ("aggregated_eval_accuracy", "eval_accuracy", "submission_division", "submission_bench")
    starts = ("Log lines had parsing errors", "Could not find config file")
    about_both = "'FID' in v['value']", "'CLIP' in v['value']"  # of an evaluation without one
    return message.startswith((*starts, *(f"CHECK for '{key}" for key in keys))) or (
        message.startswith("Failed executing") and any(rule in message for rule in about_both)
    )


def _checkers_numbers(path: Path) -> dict[int, int]:
    """The number in the file of each log line that the checker counts, from 0."""
    with path.open(encoding="latin-1") as file:
        counted = (number for number, line in enumerate(file, 1) if ":::MLLOG " in line)
        return dict(enumerate(counted))
