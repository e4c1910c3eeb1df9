"""What the commands share: their options, their report, and bad input as one sentence."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.environment import hardware, versions
from sd_perf.errors import UserError
from sd_perf.tools.result_table import line
from sd_perf.tools.results import REPOSITORY, Provenance, Result, write


def command_parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """Parser of `python -m benchmarks.NAME`, described by its documentation's first paragraph."""
    description = (documentation or "").partition("\n\n")[0]
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)


def run_command(
    name: str,
    documentation: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments and measure; returns the exit code, 2 with a sentence for bad input.

    `add_options` adds the command's own options to --tiny, --output and --git-sha. Without
    `arguments` those of the process are taken.
    """
    parser = command_parser(name, documentation)
    add_options(parser)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny network and few calls: tries the command out")
    add("--output", type=Path, metavar="FILE", help="JSON file that receives the rows")
    add("--git-sha", metavar="SHA", help="commit of this tree, where it lies without git")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    options.given = given
    try:
        return measure(options)
    except UserError as error:
        print(f"python -m benchmarks.{name}: {error}", file=sys.stderr)
        return 2


def python_path() -> str:
    """PYTHONPATH with which a child process finds this tree, and what this process was given."""
    paths = (str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(filter(None, paths))


def leave(code: int) -> NoReturn:
    """End the process. The threads of gloo's groups may abort one that Python takes down."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class Report:
    """The rows of one run of a command: printed and written as they are measured."""

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        device: torch.device,
        told_by: Sequence[str],
        packages: Sequence[str] = (),
    ) -> None:
        """`told_by` are the columns that tell the rows apart, `packages` what rivals are made of.

        UserError where the commit is unknown.
        """
        self._told_by, self._path = told_by, options.output
        found = Provenance.of_this_run(name, hardware(device), versions(*packages), options.git_sha)
        source = {**vars(found), "command": command_line(name, options.given)}
        self.result: Result[Any] = Result(name, Provenance(**source))

    def add(self, row: Any, **details: Any) -> None:
        """Print a row, keep it and all details, and write the file if one is asked for."""
        self.result.rows.append(row)
        self.result.details |= details
        print(line(row, self._told_by), flush=True)
        self._save()

    def extend(self, rows: Sequence[Any]) -> None:
        """Keep rows that are printed already, and write the file."""
        self.result.rows += rows
        self._save()

    def _save(self) -> None:
        if self._path:
            write(self._path, self.result)


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command that repeats a run, under torchrun where this process is one of several."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    program = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    return shlex.join([*program, "-m", f"benchmarks.{name}", *arguments])
