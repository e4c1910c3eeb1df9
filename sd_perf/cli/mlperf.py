"""`sd-perf mlperf check`."""

from __future__ import annotations

from typing import Literal

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import RunFolder
from sd_perf.mlperf.rules import RULESET


def check(
    run: RunFolder,
    ruleset: str = RULESET,
    division: Literal["closed", "open"] | None = None,
) -> int:
    """Run the official compliance checker on a run's MLPerf log; exits 1 where a log fails.

    Args:
        run: run folder, folder of several logs (result_*.txt), or an MLPerf log
        ruleset: of the official checker, such as 4.1.0
        division: the division that the log must be of (default: whichever it declares)
    """
    from sd_perf.mlperf.compliance import check_log
    from sd_perf.mlperf.log import LOG_NAME

    paths = [run]
    if run.is_dir():
        paths = sorted(run.glob("result_*.txt")) or [run / LOG_NAME]
    verdicts = [check_log(path, division, ruleset) for path in paths]
    for verdict in verdicts:
        print_plain(*str(verdict).split("\n"))
    return 0 if all(verdict.passed for verdict in verdicts) else 1
