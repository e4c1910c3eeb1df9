"""`sd-perf parity`: child processes compare the levels, and their results make one record.

Triton reads when it is imported whether to interpret its kernels, so each place where kernels run
is a process of its own. On a CPU one child compares tiny shapes in Triton's interpreter, and one
the config's own network on the operators that a CPU has. On a GPU one child compares at full size.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sd_perf.children import child
from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import disk_errors, write_json, write_text
from sd_perf.runs.folder import provenance
from sd_perf.runs.parity_record import (
    DEFAULT_LEVELS,
    IDENTITY,
    LEVELS,
    RECORD_NAME,
    Level,
    Where,
    identity,
    read_record,
    record_folder,
)
from sd_perf.tools.parity.comparison import Comparer
from sd_perf.tools.parity.html_report import html_report

LEVELS_OF: dict[Where, tuple[Level, ...]] = {
    "interpreter": DEFAULT_LEVELS,  # too slow for whole runs
    "structure": LEVELS,
    "gpu": LEVELS,
}
_OUT_OF_MEMORY = -9  # the exit code of a process that the system killed


def run_parity(
    config: Config, levels: Sequence[Level], tell: Callable[[str], None]
) -> tuple[dict[str, Any], Path]:
    """Compare the config's fast path with the plain one; the record, and the folder that holds it.

    Writes parity.json and parity.html there. An earlier record of the same config, code and device
    keeps its other levels. Progress goes to `tell`. UserError where the disk refuses, or a child
    process fails, whose own sentence is then on stderr.
    """
    model = dataclasses.replace(config.model, implementation="fast")
    config = dataclasses.replace(config, model=model)
    folder = record_folder(config)
    with disk_errors(folder, "choose another --run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
    earlier = read_record(folder / RECORD_NAME)  # before minutes of work, in case it is damaged
    record = _record(config, levels, _run_children(config, levels, folder, tell))
    record = _with_earlier_levels(record, earlier)
    with disk_errors(folder, "make room there"):
        write_json(folder / RECORD_NAME, record)
        write_text(folder / "parity.html", html_report(record, config))
    return record, folder


def _places() -> tuple[Where, ...]:
    return ("gpu",) if torch.cuda.is_available() else ("interpreter", "structure")


def _run_children(
    config: Config, levels: Sequence[Level], folder: Path, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The answers of the child processes, which run side by side."""
    with TemporaryDirectory() as scratch, ExitStack() as running:
        processes: list[tuple[subprocess.Popen[bytes], Path]] = []
        for where in _places():
            wanted = [level for level in levels if level in LEVELS_OF[where]]
            if not wanted:
                continue
            answer, request = (Path(scratch) / f"{where}.{file}.json" for file in ("answer", "ask"))
            asked = {"where": where, "levels": wanted, "folder": str(folder), "answer": str(answer)}
            write_json(request, {"config": dataclasses.asdict(config), **asked})
            environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
            tell(f"{where}: {', '.join(wanted)}")
            process = running.enter_context(
                child("sd_perf.tools.parity", str(request), env=environment)
            )
            processes.append((process, answer))
        codes = [process.wait() for process, _ in processes]
        if bad := next((code for code in codes if code), 0):
            killed = "was killed, as the system does when memory runs out"
            reason = killed if bad == _OUT_OF_MEMORY else "said why above"
            raise UserError(f"a part of the comparison ended with {bad}: it {reason}")
        return [json.loads(answer.read_text(encoding="utf-8")) for _, answer in processes]


def _record(config: Config, levels: Sequence[Level], parts: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for part in parts for row in part["rows"]]
    launches: Counter[str] = Counter()
    for part in parts:
        launches.update(part["triton_launches"])
    if not launches and set(levels) & set(LEVELS_OF["interpreter"]):
        rows.append(_no_kernel_ran())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        **identity(config),
        "ok": all(row["ok"] for row in rows),
        "levels": list(levels),
        "date": now,
        "command": shlex.join(sys.argv),
        **provenance(),
        "executed": {part["where"]: part["executed"] for part in parts},
        "triton_launches": dict(launches),
        "notes": [note for part in parts for note in part["notes"]],
        "curves": {name: curve for part in parts for name, curve in part["curves"].items()},
        "rows": rows,
    }


def _no_kernel_ran() -> dict[str, Any]:
    """The red row of a record that says nothing of our kernels."""
    comparer = Comparer(level="op", where="all", dtype="")
    name, note = "Triton kernels that ran", "none did, so none is proven"
    return comparer.equal(name, different=1.0, note=note).as_dict()


def _with_earlier_levels(record: dict[str, Any], earlier: Any) -> dict[str, Any]:
    """The record, with levels that only an earlier one of the same identity has."""
    same = isinstance(earlier, dict) and all(earlier.get(key) == record[key] for key in IDENTITY)
    kept = [
        level
        for level in LEVELS
        if same and level in earlier["levels"] and level not in record["levels"]
    ]
    if not kept:
        return record
    rows = [row for row in earlier["rows"] if row["level"] in kept] + record["rows"]
    return {
        **record,
        "ok": all(row["ok"] for row in rows),
        "levels": [level for level in LEVELS if level in (*kept, *record["levels"])],
        "executed": {**earlier.get("executed", {}), **record["executed"]},
        "triton_launches": {**earlier.get("triton_launches", {}), **record["triton_launches"]},
        "notes": list(dict.fromkeys([*earlier.get("notes", []), *record["notes"]])),
        "curves": record["curves"] or earlier.get("curves", {}),
        "rows": rows,
    }
