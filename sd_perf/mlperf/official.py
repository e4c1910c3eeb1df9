"""MLCommons' own tools, called in this process: silent, and what they raise is told."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd_perf.errors import DataError
from sd_perf.files import one_line
from sd_perf.mlperf.log import import_mlperf
from sd_perf.mlperf.rules import RULESET

ROUNDS = ("3.1.0", "4.0.0", "4.1.0", "5.0.0")
"""rulesets that have the benchmark, oldest first"""


class OfficialToolError(Exception):
    """A tool of mlperf-logging stopped with an error of its own."""


def require_ruleset(ruleset: str) -> str:
    """The ruleset; DataError where the installed mlperf-logging has no Stable Diffusion in it."""
    tools = Path(str(import_mlperf("compliance_checker").__file__)).parent.parent
    checks = tools / "compliance_checker" / f"training_{ruleset}" / "closed_stable_diffusion.yaml"
    points = tools / "rcp_checker" / f"training_{ruleset}" / "rcps_stable_diffusion.json"
    if ruleset not in ROUNDS or not (checks.is_file() and points.is_file()):
        raise DataError(
            f"ruleset {ruleset}: the installed mlperf-logging has no Stable Diffusion in it; use "
            f"{RULESET} (or {', '.join(ROUNDS[:-1])} for logs of those rounds)"
        )
    return ruleset


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of mlperf-logging in silence; OfficialToolError for whatever it raises."""
    return listen(function, *arguments, **options)[0]


def listen(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
    """`call` a function: what it returns, and its warnings and errors, in their order."""
    said = _Messages()
    try:
        with _heard_by(said):
            return function(*arguments, **options), said.lines
    except Exception as error:
        raise OfficialToolError(f"{type(error).__name__}: {one_line(error)}") from error


class _Messages(logging.Handler):
    """Keeps the lines of warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


@contextlib.contextmanager
def _heard_by(handler: logging.Handler) -> Iterator[None]:
    """Give what the tools log to a handler alone, and nothing of what they print to the screen."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
