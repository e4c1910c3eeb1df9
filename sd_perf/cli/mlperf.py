"""`sd-perf mlperf check`."""

from __future__ import annotations

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import RunFolder


def check(run: RunFolder) -> int:
    """Run the official compliance checker on a run's MLPerf log; exits 1 where the log fails.

    Args:
        run: run folder, or an MLPerf log
    """
    from sd_perf.mlperf.compliance import check_log
    from sd_perf.mlperf.log import LOG_NAME

    verdict = check_log(run / LOG_NAME if run.is_dir() else run)
    print_plain(str(verdict))
    return 0 if verdict.passed else 1
