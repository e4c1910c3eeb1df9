"""What a run folder tells: read once, checked, before anything is drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import read_json
from sd_perf.runs.checkpoints import CheckpointStore
from sd_perf.runs.folder import are_objects, read_manifest
from sd_perf.runs.scores import read_json_lines, read_scores

_METRICS = ("samples", "loss", "lr", "samples_per_second", "data_wait")


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures drawn at one position, row by row, and the prompts they were drawn
    from."""

    samples: int
    path: Path
    prompts: list[str]
    """empty where the grid has no sidecar"""
    columns: int


@dataclass(frozen=True)
class RunRecord:
    """Everything a report is made of. What a run does not have is empty or None."""

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    torn: bool
    """the last line of metrics.jsonl was only begun, as a killed run leaves it"""
    scores: list[dict[str, Any]]
    """one per position, oldest first"""
    pictures: list[Pictures]
    """oldest first"""
    checkpoints: list[int]
    verdict: dict[str, Any] | None
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
        return (
            -(-length // batch) * batch
            if isinstance(length, int) and isinstance(batch, int) and batch
            else None
        )


def read_record(folder: Path) -> RunRecord:
    """Read a run folder. UserError for a folder that is no run and for files that cannot be
    understood."""
    manifest = read_manifest(folder)
    metrics, torn = read_json_lines(folder / "metrics.jsonl", _METRICS)
    verdict, kernels = read_json(folder / "mlperf_verdict.json"), read_json(folder / "kernels.json")
    if not (
        verdict is None or (isinstance(verdict, dict) and isinstance(verdict.get("passed"), bool))
    ):
        raise UserError(
            f"{folder / 'mlperf_verdict.json'}: is no verdict (no true or false `passed`); check "
            "anew"
        )
    if not (kernels is None or are_objects(kernels)):
        raise UserError(
            f"{folder / 'kernels.json'}: is no list of kernel choices; restore it from a copy"
        )
    return RunRecord(
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        torn=torn,
        scores=read_scores(folder),
        pictures=[_read_pictures(path) for path in sorted(folder.glob("samples/samples_*.png"))],
        checkpoints=[
            int(path.name[-10:]) for path in CheckpointStore(folder / "checkpoints").complete()
        ],
        verdict=verdict,
        kernels=kernels,
        parity=_read_parity(folder / "parity.json"),
    )


def _read_parity(path: Path) -> dict[str, Any] | None:
    parity = read_json(path)
    if not (parity is None or (isinstance(parity, dict) and are_objects(parity.get("rows")))):
        raise UserError(f"{path}: is no parity record; make it again with sd-perf parity")
    return parity


def as_dict(value: Any) -> dict[str, Any]:
    """A section of a manifest that may be missing or of another version's making."""
    return value if isinstance(value, dict) else {}


def _read_pictures(path: Path) -> Pictures:
    name = re.fullmatch(r"samples_(\d{10})", path.stem)
    if name is None:
        raise UserError(
            f"{path}: is not named samples_<position, 10 digits>.png; move it out of the run folder"
        )
    sidecar = path.with_suffix(".json")
    told = read_json(sidecar)
    if told is None:
        return Pictures(int(name[1]), path, [], 1)
    prompts, columns = (
        (told.get("prompts"), told.get("columns")) if isinstance(told, dict) else (None, None)
    )
    if not (isinstance(prompts, list) and prompts and isinstance(columns, int) and columns > 0):
        raise UserError(
            f"{sidecar}: holds no prompts and columns of a grid; restore it from a copy, or "
            "remove it"
        )
    return Pictures(int(name[1]), path, [str(prompt) for prompt in prompts], columns)
