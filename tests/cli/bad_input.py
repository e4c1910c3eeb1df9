"""Presets, shards and commands that the tests of bad input spoil, and checks of what is said."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import yaml

from sd_perf.data.shard_writer import ShardWriter
from sd_perf.runs.checkpoints import CheckpointStore
from tests.conftest import only_sentence
from tests.data.test_samples import npy
from tests.small_run import TREE, start_train
from tests.waiting import PATIENCE

SHORT = {"training": {**TREE["training"], "max_samples": 8}, "checkpoint": {"every_samples": 4}}
AUTOENCODER = Path(__file__).parents[2] / "assets" / "tiny" / "autoencoder.safetensors"
TEXT_TINY = str(Path(__file__).parents[2] / "configs" / "text_tiny.json")
MOMENTS = np.zeros((1, 8, 8, 8), np.float32)
FAST = ["--model.implementation", "fast"]
CONTEXT = np.zeros((3, 16), np.float16)


def write_preset(path: Path, **changes: dict) -> Path:
    """TREE, two steps long, with keys changed."""
    tree = {**TREE, **SHORT}
    path.write_text(
        yaml.safe_dump(
            {
                section: {**tree.get(section, {}), **changes.get(section, {})}
                for section in {**tree, **changes}
            }
        )
    )
    return path


def saved(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def newest(run: Path) -> Path:
    path = CheckpointStore(run / "checkpoints").newest()
    assert path is not None
    return path


def matches(sentence: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in sentence


def sample_files(**changes: bytes | None) -> dict[str, bytes]:
    """A good sample's files by extension, with some changed or (None) taken out."""
    files = {"context.npy": npy(CONTEXT), "json": b"{}", "npy": npy(MOMENTS), "txt": b"a caption"}
    return {name: content for name, content in {**files, **changes}.items() if content is not None}


def write_tar(path: Path, bad: dict[str, bytes], samples: int = 4) -> None:
    """A shard whose last sample has these files."""
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension, content in (bad if number == samples - 1 else sample_files()).items():
                info = tarfile.TarInfo(f"00000{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def data_options(shards: Path) -> list[str]:
    return ["--data.format", "moments", "--data.path", str(shards), "--data.context", "precomputed"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_shards(folder: Path, bad: set[int] = frozenset(), num: int = 16) -> None:
    with ShardWriter(folder) as writer:
        for number in range(num):
            writer.write(
                np.full((8, 8, 8), np.nan if number in bad else 0.1),
                f"caption {number}",
                None,
                CONTEXT,
            )


def command_on(run: Path, name: str, preset: Path, output: Path) -> list[object]:
    commands: dict[str, list[object]] = {
        "resume": [
            "train",
            "--config",
            preset,
            "--run.dir",
            run,
            "--resume",
            "--training.max-samples",
            12,
        ],
        "export": ["export", "--source", run, "--output", output / "unet.safetensors"],
        "sample": [
            "sample",
            "--source",
            run,
            "--output",
            output,
            "--autoencoder",
            "absent.ckpt",
            "--prompt",
            "a cat",
        ],
    }
    return commands[name]


def fail(preset: Path, run: Path, *options: object, processes: int = 1) -> str:
    """The one sentence of a run that fails, of whatever number of processes; a hang fails.

    On a busy machine a process may have waited for another, and said so.
    """
    process = start_train(preset, run, *map(str, options), processes=processes)
    errors = process.communicate(timeout=PATIENCE)[1]
    if processes == 1:
        assert process.returncode == 2, errors
        return only_sentence(errors)
    assert process.returncode == 1, errors  # torchrun's own, which prints a traceback of its own
    assert not any(
        "sd_perf/" in line for line in errors.splitlines() if line.startswith("  File")
    ), errors
    ours = [line for line in errors.splitlines() if line.startswith("sd-perf:")]
    return only_sentence("\n".join(line for line in ours if ": waiting for " not in line))
