"""What a run folder holds: read and checked once, before anything is drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import read_json
from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.runs.folder import are_objects, read_manifest
from sd_perf.runs.scores import read_json_lines, read_scores

_METRICS = ("samples", "loss", "lr", "samples_per_second", "data_wait")


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
    scores: list[dict[str, Any]]
    """one per position, oldest first"""
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
        training = as_dict(self.manifest["config"].get("training"))
        length, batch = training.get("max_samples"), training.get("global_batch_size")
        if not (isinstance(length, int) and isinstance(batch, int) and batch):
            return None
        return -(-length // batch) * batch


def read_run(folder: Path) -> RunContents:
    """Read a run folder, of a run that still trains, too.

    UserError for a folder that is no run, and for a file in it that cannot be understood.
    """
    manifest = read_manifest(folder)
    metrics, torn = read_json_lines(folder / "metrics.jsonl", _METRICS)
    checkpoints = CheckpointStore(folder / "checkpoints").complete()
    return RunContents(
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        torn=torn,
        scores=read_scores(folder),
        grids=[_read_grid(path) for path in sorted(folder.glob("samples/samples_*.png"))],
        checkpoints=[position(path) for path in checkpoints],
        mlperf_verdict=_read_mlperf_verdict(folder / "mlperf_verdict.json"),
        kernels=_read_kernels(folder / "kernels.json"),
        parity=_read_parity(folder / "parity.json"),
    )


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is a dict, else an empty one.

    Another version of sd-perf may have written the manifest without the section, or differently.
    """
    return value if isinstance(value, dict) else {}


def _read_mlperf_verdict(path: Path) -> dict[str, Any] | None:
    verdict = read_json(path)
    if verdict is None or (isinstance(verdict, dict) and isinstance(verdict.get("passed"), bool)):
        return verdict
    raise UserError(f"{path}: is no verdict (no true or false `passed`); check anew")


def _read_kernels(path: Path) -> list[dict[str, Any]] | None:
    kernels = read_json(path)
    if kernels is None or are_objects(kernels):
        return kernels
    raise UserError(f"{path}: is no list of kernel choices; restore it from a copy")


def _read_parity(path: Path) -> dict[str, Any] | None:
    parity = read_json(path)
    if parity is None or (isinstance(parity, dict) and are_objects(parity.get("rows"))):
        return parity
    raise UserError(f"{path}: is no parity record; make it again with sd-perf parity")


def _read_grid(path: Path) -> PictureGrid:
    name = re.fullmatch(r"samples_(\d{10})", path.stem)
    if name is None:
        raise UserError(
            f"{path}: is not named samples_<position, 10 digits>.png; move it out of the run folder"
        )
    samples, sidecar = int(name[1]), path.with_suffix(".json")
    description = read_json(sidecar)
    if description is None:
        return PictureGrid(samples, path, prompts=[], columns=1)
    prompts, columns = as_dict(description).get("prompts"), as_dict(description).get("columns")
    if not (isinstance(prompts, list) and prompts and isinstance(columns, int) and columns > 0):
        raise UserError(
            f"{sidecar}: holds no prompts and columns of a grid; restore it from a copy, or "
            "remove it"
        )
    return PictureGrid(samples, path, prompts=[str(prompt) for prompt in prompts], columns=columns)
