"""Benchmark results: the one JSON shape that benchmarks write and `sd-perf doctor` reads.

A file holds one `Result`: the benchmark's name, its provenance, and its rows. Rows stay plain JSON
objects; a TypedDict beside each benchmark names their columns. `read` checks that all of them are
there. Needs the standard library only.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_type_hints, is_typeddict

from sd_perf.errors import UserError
from sd_perf.files import one_line, parse_json, read_untrusted, write_json

REPOSITORY = Path(__file__).resolve().parents[2]

Row = TypeVar("Row", bound=Mapping[str, Any])

Status = Literal["measured", "absent", "left out", "out of memory", "red", "failed"]
"""what became of a row: `absent` cannot run on this machine, `left out` was past the time budget,
`red` gave wrong values and was not timed, `failed` raised an error"""


class Parity(TypedDict):
    """Comparison of one backend with the reference in float64."""

    ok: bool
    """all outputs and gradients were within their error budgets"""
    checked: int
    """number of outputs and gradients compared"""
    worst: str
    """the comparison closest to, or furthest beyond, its budget"""


class KernelRow(TypedDict):
    """`kernel_speed`: one direction of one backend on one case. None: not measured."""

    op: str
    backend: str
    case: str
    shape: dict[str, int]
    direction: Literal["forward", "backward", "dgrad", "wgrad"]
    dtype: str
    calls_per_step: int
    """calls of this case in one training step"""
    bytes: float
    """least memory traffic of a call: inputs read once, outputs written once"""
    status: Status
    reason: str | None
    parity: Parity
    us: float | None
    """median microseconds of a call"""
    gb_per_second: float | None
    """`bytes` over time, 1e9 bytes per second"""
    percent_of_copy: float | None
    """that rate in percent of a device copy's, measured in the same run"""
    tflop_per_second: float | None
    """floating-point operations of matmuls over time"""
    input_sets: int | None
    """sets of inputs that the calls of a graph rotate through"""
    graph_calls: int | None
    """calls in one CUDA graph"""
    replays: int | None
    """timed replays of that graph"""
    gpu: str
    torch: str
    triton: str | None
    copy_gb_per_second: float
    source: str
    """digest of the op's source files (`sd_kernels.registry.source_digest`)"""


@dataclass(frozen=True)
class Provenance:
    """When, with which code and on what a result was measured."""

    date: str
    """UTC, ISO 8601, whole seconds"""
    command: str
    """command line that repeats the measurement from the repository root"""
    git_sha: str | None
    """commit of the working tree, "-dirty" where it differs; None: unknown"""
    machine: dict[str, Any]
    """the GPU or CPU, as the benchmark describes it"""
    versions: dict[str, Any]
    """software by name; None: not installed"""

    @classmethod
    def of_this_run(
        cls,
        benchmark: str,
        machine: dict[str, Any],
        versions: dict[str, Any],
        git_sha: str | None = None,
    ) -> Provenance:
        """Now, with this process's arguments. git is asked for the commit where none is given."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
            git_sha=git_sha or _git_sha(),
            machine=machine,
            versions=versions,
        )


@dataclass
class Result(Generic[Row]):
    """What one run of one benchmark found."""

    benchmark: str
    """name of its module: `python -m benchmarks.NAME`"""
    provenance: Provenance
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """findings that are no rows, by name"""


def write(path: Path, result: Result[Any]) -> None:
    """Write a result as JSON. The file is replaced whole, or stays as it was."""
    write_json(path, asdict(result))


def read(path: Path, benchmark: str, columns: type[Row]) -> Result[Row]:
    """Read a result of a benchmark whose rows have at least the keys of `columns`, a TypedDict.

    UserError: the file is missing, damaged, of another benchmark, or lacks a field.
    """
    try:
        data = parse_json(read_untrusted(path))
        _require_fields(data, Result, "the file")
        _require_fields(data["provenance"], Provenance, "provenance")
        for number, row in enumerate(data["rows"], 1):
            _require_fields(row, columns, f"row {number}")
        if data["benchmark"] != benchmark:
            raise ValueError(f"it is of {data['benchmark']}")
        return Result(benchmark, Provenance(**data["provenance"]), data["rows"], data["details"])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: is no result of {benchmark}.py ({one_line(error)}); restore it"
        ) from error


def _require_fields(value: Any, declared: Any, name: str) -> None:
    """ValueError unless a JSON value is an object with every declared field, nested ones too."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    for key, kind in get_type_hints(declared).items():
        if key not in value:
            raise ValueError(f"{name} has no {key!r}")
        if is_typeddict(kind):
            _require_fields(value[key], kind, f"{key} of {name}")


def _git_sha() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
