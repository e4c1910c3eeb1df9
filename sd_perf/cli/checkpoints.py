"""`sd-perf verify`: whether the checkpoints of a run are what was written."""

from __future__ import annotations

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import RunFolder


def verify(run: RunFolder) -> int:
    """Check every checkpoint of a run against its digests; exits 1 where one is damaged.

    Args:
        run: run folder
    """
    from sd_perf.runs.verify import verify_run

    verdicts = list(verify_run(run))
    for path, fault in verdicts:
        print_plain(fault or f"{path}: good")
    return 1 if any(fault for _, fault in verdicts) else 0
