"""A config of the closed division, and a complete log written for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sd_perf.config import Config
from sd_perf.mlperf.log import MLPerfLog
from sd_perf.presets import config_from_dict

CLOSED = {
    "data": {"format": "moments", "path": "shards", "allow_empty_captions": True},
    "text_encoder": {"weights": "512-base-ema.ckpt"},
    "optimizer": {"base_learning_rate": 2.3e-7},
    "mlperf": {
        "division": "closed",
        "org": "sd-perf",
        "platform": "laptop",
        "status": "onprem",
        "caches_cleared": True,
    },
}
SCORES = {
    512_000: (140.0, 0.12),
    1_024_000: (110.0, 0.14),
    1_536_000: (89.0, 0.151),
    2_048_000: (80.0, 0.17),
}


@pytest.fixture
def closed() -> Callable[..., Config]:
    """closed(section={key: value}): the benchmark's config with keys changed."""

    def make(**changes: dict) -> Config:
        config = config_from_dict(CLOSED)
        for section, values in changes.items():
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **values)}
            )
        return config

    return make


@pytest.fixture
def write_log(closed, tmp_path) -> Callable[..., Path]:
    """A concluded log of a run of four one-hour blocks from time 0, evaluated afterwards."""

    def write(
        config: Config | None = None, scores: dict[int, tuple[float, float]] = SCORES
    ) -> Path:
        path = tmp_path / "result_0.txt"
        log = MLPerfLog(path, config or closed())
        log.start_init()
        log.describe(seed=12345, train_samples=6_513_144)
        log.start_run()
        for number, samples in enumerate(SCORES):
            log.start_block(samples - 512_000)
            log.stop_block(samples, time_ms=3_600_000 * (number + 1))
        evaluation = MLPerfLog(path, config or closed())  # another process
        for samples, (fid, clip) in scores.items():
            evaluation.add_evaluation(samples, fid, clip, start_ms=4_000_000, stop_ms=5_000_000)
        evaluation.conclude()
        return path

    return write


CONVERGED = [1_536_000] * 2 + [2_048_000] * 7 + [2_560_000]


@pytest.fixture
def ten_logs(write_log, tmp_path):
    """ten_logs(samples to converge of each) -> their folder; minutes are samples over 51,200."""

    def write(converged: list[int] = CONVERGED, **changes) -> Path:
        template = write_log(**changes).read_text()
        folder = tmp_path / "stable_diffusion"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, samples in enumerate(converged):
            lines = template.replace('"value": 12345', f'"value": {number + 1}').splitlines()
            kept = [line for line in lines if not any(k in line for k in ('"eval_', '"run_stop"'))]
            kept += [line for line in lines if '"eval_samples"' in line]
            for at in (512_000, 1_024_000, samples):
                good = at == samples
                place = {"samples_count": at}
                kept += [
                    entry("eval_accuracy", 80.0 if good else 100.0, **place, metric="FID"),
                    entry("eval_accuracy", 0.16 if good else 0.1, **place, metric="CLIP"),
                ]
            start = next(line for line in lines if '"run_start"' in line)
            time = json.loads(start.partition(" ")[2])["time_ms"] + samples * 60_000 // 51_200
            kept.append(entry("run_stop", None, time, status="success"))
            (folder / f"result_{number}.txt").write_text("\n".join(kept) + "\n")
        return folder

    return write


def entry(key: str, value, time_ms: int = 5, **metadata) -> str:
    event = {"namespace": "", "time_ms": time_ms, "event_type": "POINT_IN_TIME", "key": key}
    metadata = {"file": "a.py", "lineno": 1, **metadata}
    return ":::MLLOG " + json.dumps({**event, "value": value, "metadata": metadata})


def change(path: Path, was: str, now: str) -> None:
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now))
