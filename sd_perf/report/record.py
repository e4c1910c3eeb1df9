"""What a run folder tells: read once, checked, before anything is drawn."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.distributed.checkpoints import CheckpointStore
from sd_perf.errors import UserError
from sd_perf.files import one_line
from sd_perf.training.run_folder import read_manifest

_METRICS = ("samples", "loss", "lr", "samples_per_second", "data_wait")


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures drawn at one position, row by row, and the prompts they were drawn from."""

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

    @property
    def position(self) -> int:
        """Samples the run has seen, as far as its files know."""
        return max([0, *(line["samples"] for line in self.metrics[-1:]), *self.checkpoints])

    @property
    def total(self) -> int | None:
        """Length of the run in samples, whole steps; None where the manifest does not say."""
        training = as_dict(self.manifest["config"].get("training"))
        length, batch = training.get("max_samples"), training.get("global_batch_size")
        return -(-length // batch) * batch if isinstance(length, int) and isinstance(batch, int) and batch else None


def read_record(folder: Path) -> RunRecord:
    """Read a run folder. UserError for a folder that is no run and for files that cannot be understood."""
    manifest = read_manifest(folder)
    if not (isinstance(manifest["config"], dict) and _are_objects(manifest["starts"])):
        raise UserError(f"{folder / 'run_manifest.json'}: holds no config and starts of a run; restore it from a copy")
    metrics, torn = _read_lines(folder / "metrics.jsonl", _METRICS)
    scores, _ = _read_lines(folder / "scores.jsonl", ("samples", "n"))
    by_position = {line["samples"]: line for line in scores}  # an evaluation made again supersedes the earlier one
    verdict, kernels = _read_json(folder / "mlperf_verdict.json"), _read_json(folder / "kernels.json")
    if not (verdict is None or (isinstance(verdict, dict) and isinstance(verdict.get("passed"), bool))):
        raise UserError(f"{folder / 'mlperf_verdict.json'}: is no verdict (no true or false `passed`); check anew")
    if not (kernels is None or _are_objects(kernels)):
        raise UserError(f"{folder / 'kernels.json'}: is no list of kernel choices; restore it from a copy")
    return RunRecord(
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        torn=torn,
        scores=[by_position[samples] for samples in sorted(by_position)],
        pictures=[_read_pictures(path) for path in sorted(folder.glob("samples/samples_*.png"))],
        checkpoints=[int(path.name[-10:]) for path in CheckpointStore(folder / "checkpoints").complete()],
        verdict=verdict,
        kernels=kernels,
    )


def as_dict(value: Any) -> dict[str, Any]:
    """A section of a manifest that may be missing or of another version's making."""
    return value if isinstance(value, dict) else {}


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _read_json(path: Path) -> Any:
    """The file's value; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it from a copy, or remove it") from error


def _read_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """Objects that hold numbers under `keys`, one per line; and whether a torn last line was left out."""
    if not path.is_file():
        return [], False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it from a copy") from error
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return objects, True
            raise UserError(f"{path}: line {number} cannot be read ({one_line(error)}); mend or remove it") from error
        if not (isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in keys)):
            raise UserError(f"{path}: line {number} lacks a number for one of {', '.join(keys)}; mend or remove it")
        objects.append(value)
    return objects, False


def _read_pictures(path: Path) -> Pictures:
    name = re.fullmatch(r"samples_(\d{10})", path.stem)
    if name is None:
        raise UserError(f"{path}: is not named samples_<position, 10 digits>.png; move it out of the run folder")
    sidecar = path.with_suffix(".json")
    told = _read_json(sidecar)
    if told is None:
        return Pictures(int(name[1]), path, [], 1)
    prompts, columns = (told.get("prompts"), told.get("columns")) if isinstance(told, dict) else (None, None)
    if not (isinstance(prompts, list) and prompts and isinstance(columns, int) and columns > 0):
        raise UserError(f"{sidecar}: holds no prompts and columns of a grid; restore it from a copy, or remove it")
    return Pictures(int(name[1]), path, [str(prompt) for prompt in prompts], columns)
