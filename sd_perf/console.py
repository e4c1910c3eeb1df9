"""The console of all commands. Text goes to it as text, whoever wrote it."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from sd_perf.visible import visible


class TextConsole(Console):
    """A rich console without markup: strings are printed as they stand, brackets included.

    This holds for the cells and titles of tables, too. Control characters but line breaks are made
    visible; what may hold a line break of others (a path, a key) goes through `visible` first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """rich's way from a string to what is printed, for every string that it is given."""
        return super().render_str(visible(text, keep="\n"), **options)


def styled(style: str, text: object) -> Text:
    """Text in a style such as "bold red"; the text is printed as it stands, on one line."""
    return Text(visible(text), style)


class _LossyStream:
    """A text stream whose writers go on where it takes no more: its pipe closed, its disk full."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self.lost: OSError | None = None
        """the first error of a write"""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self.lost is None:
            self.lost = error
            words = f"{self._name} cannot be written ({error.strerror}); the command goes on"
            print(f"sd-perf: {words}, its output is lost", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LossyOutput:
    """Standard output and error of this process, whose errors end no command.

    `take` puts streams in place of sys.stdout and sys.stderr that drop what cannot be written; the
    first loss of output is told on stderr.
    """

    def __init__(self) -> None:
        self._before = sys.stdout, sys.stderr

    def take(self) -> None:
        """Replace the streams. Closed descriptors are opened, lest a file of ours becomes one."""
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        self._before = sys.stdout, sys.stderr
        if sys.stdout is not None:
            sys.stdout = _LossyStream(sys.stdout, "stdout")
        if sys.stderr is not None:
            sys.stderr = _LossyStream(sys.stderr, "stderr")

    def give_back(self) -> None:
        """Restore the streams that were there before `take`."""
        sys.stdout, sys.stderr = self._before

    def is_lost(self) -> bool:
        """Whether anything printed to stdout until now could not be written."""
        if not isinstance(sys.stdout, _LossyStream):
            return False
        sys.stdout.flush()
        return sys.stdout.lost is not None
