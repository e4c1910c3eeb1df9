"""`sd-perf verify` and `sd-perf convert-checkpoints`: the checkpoint files of a run."""

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


def convert_checkpoints(run: RunFolder) -> int:
    """Convert the checkpoints of a run from the old format, torch's distributed checkpoint.

    The old folders are kept under the name old_format_samples_*; delete them when the run has gone
    on well. Nothing in them is run.

    Args:
        run: run folder
    """
    from sd_perf.runs.convert import convert_run

    converted = 0
    for path, kept in convert_run(run):
        converted += 1
        print_plain(f"{path}: converted; the old one is now {kept}")
    if not converted:
        print_plain(f"{run}: holds no checkpoint of the old format")
    return 0
