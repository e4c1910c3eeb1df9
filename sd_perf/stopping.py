"""Signals that ask a command to stop: SIGTERM, SIGUSR1, SIGHUP, and SIGINT, which Ctrl-C sends.

A command stops at the first of them: `Stopped` is raised in the main thread, so drafts and child
processes are cleaned up on the way out. Training defers that: it saves after the step under way.

Schedulers repeat SIGTERM, so a repeated signal changes nothing. Only Ctrl-C counts twice: the
second one ends training without saving, and ends a command that is still cleaning up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

CTRL_C = 130
"""exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells have it"""
STOPPED = 75
"""exit code where another signal ended it, or training has saved: EX_TEMPFAIL, "run me again" """

ONE_PRESS = 0.3
"""seconds in which signals are one request: a terminal and a wrapper may both deliver Ctrl-C"""
_LOOK_AGAIN = 0.05
"""seconds between two looks whether an import has ended"""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the signal that stops a command."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = CTRL_C if number == signal.SIGINT else STOPPED


class StopRequests:
    """The handlers of this process; use its one instance, `STOP`, in the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """the signal that asked this process to stop"""
        self._previous: dict[signal.Signals, Any] = {}
        self._speaks = True
        self._defers = False
        self._raised = False
        """whether `Stopped` was raised, or will be as soon as an import has ended"""
        self._last = 0.0

    def take(self, *, speaks: bool = True) -> None:
        """Install the handlers. A signal that is ignored stays ignored, as nohup has it.

        `speaks`: whether signals are answered on stderr.
        """
        if not self._previous:
            self.__init__()  # type: ignore[misc]
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        self._speaks = speaks

    def give_back(self) -> None:
        """Restore the handlers that were there before `take`."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def ignore(self) -> None:
        """Ignore the signals until the process has ended, so that its exit code stays."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember signals in `received` rather than stop, for the block of a training run.

        Takes the handlers for the block where the process has not taken them.
        """
        borrowed = not self._previous
        if borrowed:
            self.take()
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
            if borrowed:
                self.give_back()

    def hold(self) -> None:
        """From here on remember signals in `received` and do nothing else: the command is done."""
        self._defers, self._speaks = True, False
        self._end_wait()

    def heed(self) -> None:
        """Raise `Stopped` where a signal has come and waits for an import to end."""
        if self.received is not None and not self._defers:
            self._raise(self.received)

    def wait(self, seconds: float) -> None:
        """`hold`, and wait for a signal, but no longer than this."""
        self.hold()
        end = time.monotonic() + seconds
        while self.received is None and time.monotonic() < end:
            time.sleep(0.05)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_same_press, self._last = now - self._last < ONE_PRESS, now
        if self.received is None:
            self.received = signal.Signals(number)
            self._answer()
            if not self._defers:
                self._raise_outside_imports(signal.SIGALRM, frame)
        elif number == signal.SIGINT and not is_same_press:
            if self._raised:
                os._exit(CTRL_C)
            self._raise(signal.SIGINT)

    def _raise_outside_imports(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped` now or, as the handler of an alarm, when no import is under way.

        C code of numpy and torch drops an exception that it meets in an import, and what is half
        imported cannot be imported again.
        """
        if self._defers or self.received is None:
            return
        self._raised = True
        if _is_import(frame):
            signal.signal(signal.SIGALRM, self._raise_outside_imports)
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN)
        else:
            self._raise(self.received)

    def _end_wait(self) -> None:
        """Drop the alarm: it would end a process whose handlers are gone."""
        if self._raised:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _raise(self, number: signal.Signals) -> None:
        self._end_wait()
        self._raised = True
        raise Stopped(number)

    def _answer(self) -> None:
        if not self._speaks or self.received is None:
            return
        name = "Ctrl-C" if self.received == signal.SIGINT else self.received.name
        if self._defers:
            again = "again " if self.received == signal.SIGINT else ""
            words = f"{name}: saving after this step; Ctrl-C {again}to quit without"
        else:
            words = f"stopped by {name}"
        # Not through sys.stderr, which the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(2, f"sd-perf: {words}\n".encode())


def _is_import(frame: FrameType | None) -> bool:
    """Whether a frame, or what has called it, is of Python's import system."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


STOP = StopRequests()
"""the handlers of this process"""
