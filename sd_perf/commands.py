"""Commands that are printed for a user to paste into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from sd_perf.visible import visible

_START_FLAGS = ("--resume", "--no-resume", "--fresh", "--no-fresh")
"""flags of `train` that say how a run starts"""


def sd_perf_command(*arguments: object) -> str:
    """`sd-perf` with these arguments as one line for a shell, started as this process was.

    Arguments are quoted where the shell would not take them literally. The line has no control
    characters, so it can be printed, copied and pasted: an argument with such characters is written
    as $'...', which bash, zsh and ksh read.
    """
    return " ".join(_shell_word(str(word)) for word in (*_program(), *arguments))


def resume_command() -> str:
    """The command that started this process, with --resume (and without --fresh)."""
    options = [word for word in sys.argv[1:] if word not in _START_FLAGS]
    return sd_perf_command(*options, "--resume")


def _program() -> list[str]:
    """How this process was started, without its arguments: a script or `python -m sd_perf`."""
    script = Path(sys.argv[0])
    if script.parts[-2:] == ("sd_perf", "__main__.py"):
        return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if script.name != "sd-perf" or shutil.which("sd-perf") == sys.argv[0]:
        return ["sd-perf"]
    return sys.argv[:1]


def _shell_word(word: str) -> str:
    quoted = shlex.quote(word)
    if visible(quoted) == quoted:
        return quoted
    escaped = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(word)
    )
    return f"$'{''.join(escaped)}'"
