"""The command as users start it, in a process of its own: one case of each kind of fault that
docs/reliability.md lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.runs.lock import RunLock
from tests.cli.bad_input import AUTOENCODER, data_options, newest, write_preset, write_tar
from tests.conftest import only_sentence
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "sd-perf"
HERE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
MEMORY = 1.5e9
"""bytes that a process may have held when it refuses what it was given"""


@dataclass
class Case:
    """A command, and what its one sentence says."""

    arguments: list[object]
    words: str
    code: int = 2
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = ""
    """file in place of one that is read"""
    held: object = None
    """what must live while the command runs"""


ARun = Callable[[], Path]
"""makes a complete run of two steps, with a checkpoint after each"""


@dataclass
class Done:
    """What a process left."""

    code: int
    output: str
    errors: str
    memory: int
    """bytes that it held at most"""


_MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[3:], timeout=float(sys.argv[2]))
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
"""A small process between: what a child has held at most begins with what its parent holds, which
is gigabytes in a process of many tests."""


def start(case: Case, folder: Path, *program: object) -> Done:
    """Run a command to its end."""
    files = Path(case.stdout or folder / "stdout"), folder / "stderr", folder / "memory"
    with files[0].open("wb") as output, files[1].open("wb") as errors:
        command = sys.executable, "-c", _MEASURED, files[2], PATIENCE, *program, *case.arguments
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **HERE, **case.environment},
            stdout=output,
            stderr=errors,
        )
    words = "" if case.stdout else files[0].read_text(), files[1].read_text()
    return Done(done.returncode, *words, 1024 * int(files[2].read_text()))


def a1_prompts(folder: Path, a_run: ARun) -> Case:
    write_scenes(folder / "pictures", 2, seed=0)
    table = folder / "prompts.tsv"
    table.write_text('id\tcaption\n1\t"The ""Line"""\n2\n')
    command = ["score", "--images", folder / "pictures", "--captions", table]
    return Case([*command, "--clip-weights", "absent.bin"], "line 3 has 1 columns")


def a2_damaged_checkpoint(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    path = next(newest(run).glob("model_*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return Case(["export", "--source", run, "--output", folder / "out"], "damaged")


def a3_checkpoint_that_is_code(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    (newest(run) / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (newest(run) / "state.json").write_text('{"samples": 8, "steps": 2}')
    return Case(["convert-checkpoints", run], "it names os.system")


def a4_lock(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    (lock := RunLock()).take(run)
    words = f"is in use by {os.uname().nodename}, process {os.getpid()}"
    return Case(["convert-checkpoints", run], words, held=lock)


def a5_yaml(folder: Path, a_run: ARun) -> Case:
    (folder / "c.yaml").write_text("training: {}\ntraining: {}\n")
    return Case(["estimate", "--config", folder / "c.yaml"], "training")


def a6_pictures(folder: Path, a_run: ARun) -> Case:
    folder = pictures(folder)
    Image.new("F", (64, 64)).save(folder / "b.png", "TIFF")
    return Case(prepare(folder), "black and white are not defined")


def a7_shards(folder: Path, a_run: ARun) -> Case:
    (folder / "shards").mkdir()
    write_tar(folder / "shards/0.tar", {"npy": b"no array"}, samples=1)
    with (folder / "shards/0.tar").open("ab") as shard:
        shard.write((folder / "shards/0.tar").read_bytes())
    preset = write_preset(folder / "c.yaml")
    command = ["data", "bench", "--config", preset, *data_options(folder / "shards")]
    return Case(command, "goes on behind the end of the archive")


def a8_weights(folder: Path, a_run: ARun) -> Case:
    path = folder / "unet.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    return Case(["export", "--source", path, "--output", folder / "out"], "add --groups")


def a9_numbers(folder: Path, a_run: ARun) -> Case:
    preset = write_preset(folder / "c.yaml")
    command = ["config", "show", "--config", preset, "--optimizer.epsilon", "inf"]
    return Case(command, "optimizer.epsilon: inf cannot be used")


def a10_bad_pictures(folder: Path, a_run: ARun) -> Case:
    folder = pictures(folder)
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.png").write_bytes(b"none")
    return Case(prepare(folder), "2 images cannot be used, more than data.max_bad_samples (0)")


def b11_full_output(folder: Path, a_run: ARun) -> Case:
    preset = write_preset(folder / "c.yaml")
    return Case(
        ["config", "show", "--config", preset],
        "stdout cannot be written",
        code=1,
        stdout="/dev/full",
    )


def b12_unfinished_run(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    newest(run).rename(folder / "taken")
    command = ["train", "--config", write_preset(folder / "c.yaml"), "--run.dir", run]
    return Case([*command, "--fresh", "--dry-run"], "--resume")


def b13_missing_process(folder: Path, a_run: ARun) -> Case:
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = ["train", "--config", write_preset(folder / "c.yaml"), "--run.join-seconds", "1"]
    return Case(command, "within 1 s", environment=launcher)


def b14_link_to_a_run(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    (folder / "link").symlink_to(run)
    return Case(["config", "diff", folder / "link", run], "the configs are the same", code=0)


def b15_log(folder: Path, a_run: ARun) -> Case:
    (folder / "result_0.txt").write_text(':::MLLOG {"key": "seed"}\n')
    return Case(["mlperf", "rcp", folder], "result_0.txt: line 1 is damaged (it has no 'value')")


def c16_control_characters(folder: Path, a_run: ARun) -> Case:
    return Case(["report", folder / "\x1b[31mno\nrun"], r"\x1b[31mno\nrun")


def c17_json(folder: Path, a_run: ARun) -> Case:
    run = a_run()
    (run / "run_manifest.json").write_text("[" * 100_000)
    return Case(["watch", run, "--once"], "nested deeper")


def c17_fifo(folder: Path, a_run: ARun) -> Case:
    os.mkfifo(folder / "c.yaml")
    return Case(["train", "--config", folder / "c.yaml"], "it is a FIFO")


def c17_long_name(folder: Path, a_run: ARun) -> Case:
    return Case(["fetch", "inception", "--check", "--output-dir", "x" * 300], "File name too long")


def c18_bounds(folder: Path, a_run: ARun) -> Case:
    preset = write_preset(folder / "c.yaml")
    command = ["train", "--config", preset, "--training.global-batch-size", 4 * 10**12]
    return Case(command, "training.global_batch_size: 4000000000000 cannot be used")


def c19_three_gigabytes(folder: Path, a_run: ARun) -> Case:
    folder = pictures(folder)
    (folder / "captions.jsonl").write_text("")
    os.truncate(folder / "captions.jsonl", 3 * 10**9)
    return Case(["data", "verify", "--images", folder], "line 1 has more than 1,048,576 bytes")


def c20_captions_elsewhere(folder: Path, a_run: ARun) -> Case:
    folder = pictures(folder)
    line = {"file": "../a.png", "captions": ["a"]}
    (folder / "captions.jsonl").write_text(json.dumps(line) + "\n")
    return Case(["data", "verify", "--images", folder], "outside of the folder")


def pictures(folder: Path) -> Path:
    """A folder of two captioned pictures, a.png and b.png."""
    folder = folder / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), (1, 2, ord(name))).save(folder / f"{name}.png")
    lines = [json.dumps({"file": f"{name}.png", "captions": [name]}) + "\n" for name in "ab"]
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


def prepare(images: Path) -> list[object]:
    target = ["--data.path", images.parent / "shards", "--autoencoder", AUTOENCODER]
    preset = write_preset(images.parent / "c.yaml")
    return ["data", "prepare", "--config", preset, "--images", images, *target]


CASES = [
    *(a1_prompts, a2_damaged_checkpoint, a3_checkpoint_that_is_code, a4_lock, a5_yaml),
    *(a6_pictures, a7_shards, a8_weights, a9_numbers, a10_bad_pictures),
    *(b11_full_output, b12_unfinished_run, b13_missing_process, b14_link_to_a_run, b15_log),
    *(c16_control_characters, c17_json, c17_fifo, c17_long_name, c18_bounds),
    *(c19_three_gigabytes, c20_captions_elsewhere),
]


def check(case: Case, folder: Path, *program: object) -> None:
    done = start(case, folder, *program)
    assert done.code == case.code, done.errors
    if case.code == 0:
        assert case.words in done.output and not done.errors
    else:
        assert case.words in only_sentence(done.errors)
        assert only_sentence(done.errors).isprintable() and not done.output
    assert done.memory < MEMORY


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case, tmp_path, request):
    def a_run() -> Path:
        return request.getfixturevalue("copied_run")

    check(case(tmp_path, a_run), tmp_path, sys.executable, "-m", "sd_perf")


def test_the_console_script(tmp_path, request):
    if not SCRIPT.exists():
        pytest.skip("sd-perf is not installed")
    check(a5_yaml(tmp_path, request), tmp_path, SCRIPT)
