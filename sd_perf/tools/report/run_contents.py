"""What a run folder holds: read and checked once, before anything is drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import RESTORE, read_json, require_shape
from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.runs.folder import read_manifest, run_length
from sd_perf.runs.parity_record import RECORD_NAME, read_record
from sd_perf.runs.scores import sort_out_lines, sort_out_scores

_METRICS = ("samples", "loss", "lr", "samples_per_second", "data_wait")
_MACHINE = {"gpus?": ([str], None)}
_VERDICT = {"passed": bool}
_KERNELS = [{"op": str, "backend": str}]
_GRID = {"prompts": [str], "columns": int}
"""shapes of JSON files, see `sd_perf.files.require_shape`"""


@dataclass(frozen=True)
class PictureGrid:
    """An image of many pictures, row by row, drawn at one position of the run."""

    samples: int
    """samples that the run had seen"""
    path: Path
    prompts: list[str]
    """one per picture; empty where no JSON file beside the image tells them"""
    columns: int
    """pictures per row"""


@dataclass(frozen=True)
class RunContents:
    """Everything a report is made of. What a run does not have is empty or None."""

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    """one per logged step, oldest first"""
    torn: bool
    """whether the last line of metrics.jsonl is incomplete, as a killed run leaves it"""
    damaged: list[str]
    """other lines of metrics and scores that are left out: the file, line and reason"""
    scores: list[dict[str, Any]]
    """oldest first, see `sort_out_scores`"""
    grids: list[PictureGrid]
    """oldest first"""
    checkpoints: list[int]
    """positions of complete checkpoints in samples, oldest first"""
    mlperf_verdict: dict[str, Any] | None
    kernels: list[dict[str, Any]] | None
    parity: dict[str, Any] | None

    @property
    def position(self) -> int:
        """Samples the run has seen, as far as its files know."""
        return max([0, *(line["samples"] for line in self.metrics[-1:]), *self.checkpoints])

    @property
    def total(self) -> int | None:
        """Length of the run in samples, whole steps; None where the manifest does not say."""
        return run_length(self.manifest)


def read_run(folder: Path) -> RunContents:
    """Read a run folder, of a run that still trains, too.

    Damaged lines of metrics and scores are listed and left out. UserError for a folder that is no
    run, and for any other file in it that cannot be understood.
    """
    manifest = read_manifest(folder)
    where = f"{folder / 'run_manifest.json'}: holds no machine of a run"
    require_shape(as_dict(manifest.get("machine")), _MACHINE, where)
    metrics = sort_out_lines(folder / "metrics.jsonl", _METRICS)
    scores = sort_out_scores(folder)
    checkpoints = CheckpointStore(folder / "checkpoints").complete()
    return RunContents(
        folder=folder,
        manifest=manifest,
        metrics=metrics.objects,
        torn=metrics.torn,
        damaged=[
            *(f"metrics.jsonl {fault}" for fault in metrics.damaged),
            *scores.damaged,
        ],
        scores=scores.objects,
        grids=[_read_grid(path) for path in sorted(folder.glob("samples/samples_*.png"))],
        checkpoints=[position(path) for path in checkpoints],
        mlperf_verdict=_read_shaped(
            folder / "mlperf_verdict.json", _VERDICT, "is no verdict of the compliance checker"
        ),
        kernels=_read_shaped(folder / "kernels.json", _KERNELS, "is no list of kernel choices"),
        parity=read_record(folder / RECORD_NAME),
    )


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is a dict, else an empty one.

    Another version of sd-perf may have written the manifest without the section, or differently.
    """
    return value if isinstance(value, dict) else {}


def _read_shaped(path: Path, shape: Any, trouble: str) -> Any:
    """The value of a JSON file, of this shape; None where there is no file."""
    value = read_json(path)
    if value is not None:
        require_shape(value, shape, f"{path}: {trouble}")
    return value


def _read_grid(path: Path) -> PictureGrid:
    name = re.fullmatch(r"samples_(\d{10})", path.stem)
    if name is None:
        raise UserError(
            f"{path}: is not named samples_<position, 10 digits>.png; move it out of the run folder"
        )
    samples, sidecar = int(name[1]), path.with_suffix(".json")
    trouble = "holds no prompts and columns of a grid"
    grid = _read_shaped(sidecar, _GRID, trouble)
    if grid is None:
        return PictureGrid(samples, path, prompts=[], columns=1)
    if not grid["prompts"] or grid["columns"] < 1:
        raise UserError(f"{sidecar}: {trouble} (one of them is empty); {RESTORE}")
    return PictureGrid(samples, path, prompts=grid["prompts"], columns=grid["columns"])
