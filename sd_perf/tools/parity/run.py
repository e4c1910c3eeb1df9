"""`sd-perf parity`: levels are compared in child processes, since Triton reads when it is imported
how it shall run.

On a CPU one child has Triton's interpreter, which takes tiny shapes, and one has the config's own
network on the operators that a CPU has. On a GPU one child has the full size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import disk_errors, read_json, write_json, write_text
from sd_perf.runs.folder import provenance
from sd_perf.runs.parity_record import IDENTITY, LEVELS, NAME, USUAL, identity, record_folder
from sd_perf.tools.parity.rows import Row, exact
from sd_perf.tools.parity.subject import Where

Tell = Callable[[str], None]
PARTS: dict[Where, tuple[str, ...]] = {
    "interpreter": USUAL,
    "structure": LEVELS,
    "gpu": LEVELS,
}


def run_parity(config: Config, levels: tuple[str, ...], tell: Tell) -> tuple[dict[str, Any], Path]:
    """Compare the config's fast path with the plain one; returns the record and the folder that now
    holds it.

    An earlier record of the same config, code and device keeps its other levels.
    """
    from sd_perf.tools.parity.page import page

    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, implementation="fast")
    )
    folder = record_folder(config)
    with disk_errors(folder, "choose another --run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
    places: tuple[Where, ...] = (
        ("gpu",) if torch.cuda.is_available() else ("interpreter", "structure")
    )
    places = tuple(where for where in places if set(levels) & set(PARTS[where]))
    record = _record(config, levels, _children(config, levels, places, folder, tell))
    record = _with_earlier(record, read_json(folder / NAME))
    with disk_errors(folder, "make room there"):
        write_json(folder / NAME, record)
        write_text(folder / "parity.html", page(record, config))
    return record, folder


def _with_earlier(record: dict[str, Any], earlier: Any) -> dict[str, Any]:
    """The record with the levels that only an earlier one of the same config, code and device
    has."""
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
        "executed": {**earlier["executed"], **record["executed"]},
        "triton_launches": {**earlier["triton_launches"], **record["triton_launches"]},
        "notes": list(dict.fromkeys([*earlier["notes"], *record["notes"]])),
        "curves": record["curves"] or earlier["curves"],
        "rows": rows,
    }


def _children(
    config: Config, levels: tuple[str, ...], places: tuple[Where, ...], folder: Path, tell: Tell
) -> list[dict[str, Any]]:
    """What each process found, side by side."""
    with TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        running = []
        for where in places:
            wanted = [level for level in levels if level in PARTS[where]]
            answer, request = (
                Path(scratch) / f"{where}.json",
                Path(scratch) / f"{where}.request.json",
            )
            asked = {
                "config": dataclasses.asdict(config),
                "where": where,
                "levels": wanted,
                "folder": str(folder),
            }
            write_json(request, {**asked, "answer": str(answer)})
            command = [sys.executable, "-m", "sd_perf.tools.parity", str(request)]
            environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
            tell(f"{where}: {', '.join(wanted)}")
            running.append(
                (stack.enter_context(subprocess.Popen(command, env=environment)), answer)
            )
        codes = [process.wait() for process, _ in running]
        if bad := next((code for code in codes if code), 0):
            said = (
                "was killed, as the system does when memory runs out"
                if bad == -9
                else "said why above"
            )
            raise UserError(f"a part of the comparison ended with {bad}: it {said}")
        return [json.loads(answer.read_text(encoding="utf-8")) for _, answer in running]


def _record(config: Config, levels: tuple[str, ...], parts: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for part in parts for row in part["rows"]]
    launches: Counter[str] = Counter()
    for part in parts:
        launches.update(part["triton_launches"])
    if not launches and set(levels) & set(PARTS["interpreter"]):
        rows.append(
            exact(
                "op", "Triton kernels that ran", "all", "", 1.0, "none did, so none is proven"
            ).as_dict()
        )
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


def compare(
    config: Config, where: Where, levels: set[str], folder: Path, tell: Tell
) -> dict[str, Any]:
    """One process's part, as JSON takes it."""
    from sd_kernels import launch
    from sd_perf.tools.parity.network import compare_blocks, compare_networks
    from sd_perf.tools.parity.operators import compare_operators
    from sd_perf.tools.parity.step import compare_steps
    from sd_perf.tools.parity.subject import Subject
    from sd_perf.tools.parity.trajectory import compare_trajectories
    from sd_perf.tools.parity.world import compare_worlds

    subject, rows = Subject.of(config, where), list[Row]()
    curves: dict[str, list[float]] = {}
    if "op" in levels:
        rows += compare_operators(subject)
    if "block" in levels:
        rows += compare_blocks(subject)
    if levels & {"unet", "grad"}:
        rows += compare_networks(subject, levels)
    if "step" in levels:
        rows += compare_steps(subject)
    if "trajectory" in levels:
        rows += compare_trajectories(subject, curves)
    if "world" in levels:
        rows += compare_worlds(config, where, folder / "world", tell)
    executed: dict[str, dict[str, int]] = {}
    for (op, backend), calls in sorted(subject.executed.items()):
        executed.setdefault(op, {})[backend] = calls
    return {
        "where": where,
        "rows": [row.as_dict() for row in rows],
        "executed": executed,
        "triton_launches": dict(launch.executed),
        "notes": subject.notes,
        "curves": curves,
    }
