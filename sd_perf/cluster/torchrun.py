"""`python -m sd_perf.cluster.torchrun`: torchrun, with the exit code of the run.

torchrun itself ends with 1 whatever its processes ended with, answers no SIGUSR1, and kills them
30 seconds after a signal. Here a signal is handed to the processes, which save and leave, and the
exit code is theirs: 75 stays 75. Options are torchrun's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sd_perf.errors import RankLostError
from sd_perf.stopping import STOP_SIGNALS, Stopped

_SAVING = 3600
"""seconds that processes have to save and leave after one of them has left"""
_LOST = RankLostError.exit_code


def main(arguments: list[str]) -> int:
    """Start the processes and wait for them; returns the exit code of the run."""
    options = torchrun.parse_args(arguments)
    options.signals_to_handle = "SIGUSR2"  # not those that are handed on
    options.shutdown_timeout = _SAVING
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = options.signals_to_handle
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hand_on)
    # Its own words on a process that ended with 75 are those of a failure.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="sd_perf_torchrun_") as logs:
            options.log_dir = options.log_dir or logs  # torchrun's own folder would stay
            torchrun.run(options)
    except Stopped as stop:
        return stop.exit_code
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0:
                _tell_killed(rank, signal.Signals(-code))
        return exit_code(list(codes.values()))
    return 0


def _tell_killed(rank: int, number: signal.Signals) -> None:
    why = " (so the system ends a process for memory)" if number == signal.SIGKILL else ""
    words = f"sd-perf: rank {rank} on {platform.node()} was ended by {number.name}{why}"
    print(words, file=sys.stderr, flush=True)


def exit_code(codes: list[int]) -> int:
    """One exit code for the run: that of who ended it, not of those that noticed.

    A negative code is the signal that killed a process.
    """
    told = [code for code in codes if 0 < code != _LOST]
    return min(told) if told else _LOST


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the processes; before there are any, stop."""
    children = [
        int(child)
        for thread in Path("/proc/self/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    if not children:
        raise Stopped(signal.Signals(number))
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
