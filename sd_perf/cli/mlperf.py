"""`sd-perf mlperf ...`: MLPerf logs, and what a submission is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from sd_perf.cli.console import print_plain, table_console
from sd_perf.cli.options import GPUName, require_between
from sd_perf.distributed.launcher import MAX_RANKS
from sd_perf.errors import UserError
from sd_perf.mlperf.rules import RULESET

Runs = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]]
"""run folders, folders of logs or logs, at least one, given without an option's name"""


def check(
    runs: Runs,
    ruleset: str | None = None,
    division: Literal["closed", "open"] | None = None,
    werror: bool = False,
) -> int:
    """Run the official compliance checker on MLPerf logs; exits 1 where one fails.

    Args:
        runs: run folders, folders of logs (result_*.txt in them or below), or MLPerf logs
        ruleset: of the official checker, such as 4.1.0 (default: that of the round that the log
            was made in; 5.0.0 for new ones)
        division: the division that the logs must be of (default: whichever each declares)
        werror: whether the checker's warnings fail a log
    """
    from sd_perf.mlperf.compliance import check_log
    from sd_perf.mlperf.results import logs_of

    verdicts = [check_log(log, division, ruleset, werror) for log in logs_of(_given(runs))]
    for verdict in verdicts:
        print_plain(*str(verdict).split("\n"))
    failed = sum(not verdict.passed for verdict in verdicts)
    if len(verdicts) > 1:
        print_plain(f"{len(verdicts) - failed} of {len(verdicts)} logs pass")
    return 1 if failed else 0


def rcp(runs: Runs, ruleset: str | None = None) -> int:
    """Run the official RCP test on the runs of a submission: have they converged as the reference
    does? Exits 1 where they fail.

    Args:
        runs: run folders, a folder of logs (result_*.txt), or logs; ten make a submission
        ruleset: of the official checker (default: that of the round that the logs were made in)
    """
    from sd_perf.mlperf.convergence_points import check_rcp
    from sd_perf.mlperf.pages import rcp_page
    from sd_perf.mlperf.results import one_set, read_results

    results, taken = read_results(one_set(_given(runs)), ruleset)
    verdict = check_rcp(results, taken)
    table_console().print(*rcp_page(verdict), sep="\n")
    return 0 if verdict.passed else 1


def score(
    runs: Runs, ruleset: str | None = None, gpus: int | None = None, gpu: GPUName | None = None
) -> int:
    """Score the runs of a submission as MLPerf does: minutes to the first checkpoint that passes,
    without the fastest and the slowest run. Exits 1 where something stands against submitting them.

    Args:
        runs: run folders, a folder of logs (result_*.txt), or logs; ten make a submission
        ruleset: of the official tools (default: that of the round that the logs were made in)
        gpus: GPUs of the system in all, for samples/s of each
        gpu: kind of these GPUs, for their MFU
    """
    from sd_perf.mlperf.pages import score_page
    from sd_perf.mlperf.results import one_set, read_results
    from sd_perf.mlperf.score import score_runs

    if gpus is not None:
        require_between("--gpus", gpus, 1, MAX_RANKS)
    if gpu is not None and gpus is None:
        raise UserError(f"--gpu {gpu}: MFU needs the number of GPUs, too; add --gpus")
    peak = _peak(gpu) if gpu is not None else None
    results, taken = read_results(one_set(_given(runs)), ruleset)
    scored = score_runs(results, taken)
    table_console().print(*score_page(scored, taken, gpus, peak), sep="\n")
    return 1 if scored.faults() else 0


def system(
    org: str,
    system: str,
    output: Path,
    division: Literal["closed", "open"] = "closed",
    status: Literal["onprem", "cloud", "research", "preview"] = "research",
    nodes: int = 1,
    fields: tuple[str, ...] = (),
    ruleset: str = RULESET,
) -> int:
    """Write the system description of a submission from what this machine says of itself, and name
    the fields that are left to fill in.

    Args:
        org: who submits
        system: name of the system
        output: JSON file to write
        division: of the submission
        status: how the system can be had
        nodes: machines like this one
        fields: further fields, as name=value
        ruleset: of the official checker
    """
    from sd_perf.mlperf.official import require_ruleset
    from sd_perf.mlperf.package import unfinished
    from sd_perf.mlperf.system import STATUS, describe_system, official_faults, write_system

    require_between("--nodes", nodes, 1, MAX_RANKS)
    require_ruleset(ruleset)
    named = {
        "submitter": org,
        "division": division,
        "status": STATUS[status],
        "system_name": system,
        "number_of_nodes": str(nodes),
        **_named_fields(fields),
    }
    description = describe_system(named)
    write_system(output, description)
    faults = official_faults(output, ruleset)
    print_plain(output, *faults, *filter(None, [unfinished(description)]))
    return 1 if faults else 0


def package(
    runs: Runs,
    org: str,
    system: str,
    output: Path,
    description: Path | None = None,
    ruleset: str | None = None,
) -> int:
    """Put ten runs into the tree of a submission, with the code that made them, and run all
    official checkers over it; exits 1 with the reasons where one is not green.

    Args:
        runs: ten run folders or logs, or a folder of logs (result_*.txt)
        org: who submits
        system: name of the system, of letters, digits, - and _
        output: folder to write, which must not be there or be empty
        description: system description (default: of this machine, with blanks)
        ruleset: of the official tools (default: that of the round that the logs were made in)
    """
    from sd_perf.mlperf.package import check_package, unfinished, write_package
    from sd_perf.mlperf.results import one_set, read_results
    from sd_perf.mlperf.system import STATUS, describe_system, read_system

    results, taken = read_results(one_set(_given(runs)), ruleset)
    if description is not None:
        described = read_system(description)
    else:
        named = {"submitter": org, "division": results[0].division, "system_name": system}
        described = describe_system({**named, "status": STATUS["research"]})
    folder = write_package(results, described, org, system, output)
    print_plain(folder)
    red = 0
    for check in check_package(folder, results, taken):
        state = "red  " if check.faults else "green"
        print_plain(f"{state}  {check.name}", *(f"  - {fault}" for fault in check.faults))
        red += bool(check.faults)
    end = "a check is red: mend it before you submit" if red else "all checks are green"
    print_plain(*filter(None, [unfinished(described), end]))
    return 1 if red else 0


def convergence(runs: Runs, output: Path | None = None) -> int:
    """Say whether runs are on the way of published runs of their batch size, and draw FID, CLIP
    score and loss beside theirs. Works while a run is under way.

    Args:
        runs: run folders, folders of logs (result_*.txt), or MLPerf logs
        output: HTML page to write (default: convergence.html in the run folder, where one is given)
    """
    from sd_perf.mlperf.reference_curves import verdict
    from sd_perf.tools.report.convergence import PAGE, read_progress, write_convergence

    progresses = read_progress(_given(runs))
    for progress in progresses:
        print_plain(f"{progress.name}: {verdict(progress)}")
    if output is None and len(runs) == 1 and (runs[0] / "run_manifest.json").is_file():
        output = runs[0] / PAGE
    if output is None:
        print_plain("--output F.html draws the curves")
        return 0
    write_convergence(progresses, output)
    print_plain(output)
    return 0


def _named_fields(fields: tuple[str, ...]) -> dict[str, str]:
    """{name: value} of name=value; UserError for what is not that."""
    parts = [field.partition("=") for field in fields]
    for field, (name, equals, _) in zip(fields, parts, strict=True):
        if not (name and equals):
            raise UserError(f"--fields: {field!r} cannot be used; write name=value, as cooling=air")
    return {name: value for name, _, value in parts}


def _given(runs: tuple[Path, ...]) -> tuple[Path, ...]:
    """The runs; UserError where there are none."""
    if not runs:
        raise UserError(
            "no run is named; give run folders, folders of logs (result_*.txt), or logs"
        )
    return runs


def _peak(gpu: str) -> float:
    """Dense bfloat16 FLOP/s of a GPU of the table; UserError for one that is not in it."""
    from sd_kernels.targets import named

    try:
        return named(gpu).peak.value
    except LookupError as error:
        raise UserError(f"--gpu {error}") from error
