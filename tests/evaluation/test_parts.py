"""An evaluation in parts: by several processes, stopped and continued, beside training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_perf.config import Config
from sd_perf.distributed.world import start_world
from sd_perf.errors import CheckpointError, UserError
from sd_perf.evaluation import evaluate, measured
from sd_perf.evaluation.evaluate import Wanted, evaluate_run, scores_table
from sd_perf.evaluation.evaluator import Evaluator
from sd_perf.runs.checkpoints import load_component
from sd_perf.runs.lock import RunLock
from sd_perf.runs.scores import read_scores
from sd_perf.stopping import Stopped
from tests.evaluation.test_evaluate import config, without_times  # noqa: F401 (a fixture)
from tests.waiting import PATIENCE

BATCH = 5
"""of the 12 prompts: two whole batches and a rest"""


@pytest.fixture
def run(config: Config, tmp_path: Path) -> tuple[Path, Config]:  # noqa: F811
    """A copy of the trained run without scores, and its config with a small batch."""
    folder = tmp_path / "run"
    shutil.copytree(config.run.dir, folder)
    (folder / "scores.jsonl").unlink()
    manifest = json.loads((folder / "run_manifest.json").read_text())
    manifest["config"]["evaluation"]["batch_size"] = BATCH
    (folder / "run_manifest.json").write_text(json.dumps(manifest))
    from sd_perf.runs.folder import read_run_config

    return folder, read_run_config(folder)


def scores_of(folder: Path) -> list[dict]:
    return [without_times(line) for line in read_scores(folder)]


def whole(folder: Path, config: Config, wanted: Wanted | None = None) -> list[str]:  # noqa: F811
    told: list[str] = []
    evaluate_run(folder, config, start_world("cpu"), told.append, wanted)
    return told


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("other")))


def test_what_was_drawn_before_a_stop_is_not_drawn_again(run, monkeypatch):
    folder, settings = run
    other = copied(folder)
    whole(folder, settings, Wanted(pictures=folder / "pictures"))
    drawn, draw = [], evaluate.Evaluator.draw

    def noted(self, weights, seed, starts, source):
        drawn.append(list(starts))
        return draw(self, weights, seed, starts, source)

    def stopping(self, *arguments, **options):
        yield from list(noted(self, *arguments, **options))[:2]
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "draw", stopping)
    with pytest.raises(Stopped):
        whole(other, settings)
    assert len(list((other / "evaluation").rglob("pictures_*"))) == 1
    monkeypatch.setattr(Evaluator, "draw", noted)
    told = whole(other, settings)
    assert drawn == [[0, 5, 10], [10], [0, 5, 10]]
    assert "10 pictures were drawn before" in told[0]
    assert scores_of(other) == scores_of(folder)
    grids = [sorted((path / "samples").glob("*.png")) for path in (folder, other)]
    assert [p.read_bytes() for p in grids[0]] == [p.read_bytes() for p in grids[1]]
    assert not list((other / "evaluation").rglob("*.safetensors"))
    assert len(list((folder / "pictures").glob("*.png"))) == settings.evaluation.num_prompts


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_parts_are_drawn_again(run, damage, monkeypatch):
    folder, settings = run
    other = copied(folder)
    whole(folder, settings, Wanted(checkpoint=32))
    monkeypatch.setattr(measured, "KEEP_SECONDS", -1)  # a file for each batch
    monkeypatch.setattr(Evaluator, "scores", lambda *_: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception):
        whole(other, settings, Wanted(checkpoint=32))
    monkeypatch.undo()
    parts = sorted((other / "evaluation").rglob("pictures_*"))
    assert [path.stem for path in parts] == [f"pictures_{n:08d}" for n in (0, 5, 10)]
    if damage == "bit":
        content = bytearray(parts[1].read_bytes())
        content[-5] ^= 1
        parts[1].write_bytes(content)
    elif damage == "cut":
        parts[1].write_bytes(parts[1].read_bytes()[:-9])
    else:
        save_file(load_file(parts[1]), parts[1], {"of": "other", "seen": "[]"})
    told = whole(other, settings, Wanted(checkpoint=32))
    assert f"{parts[1]}: is removed, and its pictures are drawn again" in told[0]
    assert "7 pictures were drawn before" in told[1]
    assert scores_of(other) == scores_of(folder)


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("indices", torch.tensor(0), "[]"),
        ("features", torch.zeros(1, dtype=torch.bfloat16), "[]"),
        ("grid", torch.zeros(1), "[]"),
        ("cosines", torch.zeros(1), "5"),
        ("cosines", torch.zeros(1), "[" * 100_000),
    ],
)
def test_hostile_parts(name, value, seen, tmp_path):
    """What others may have put there is removed and told, whatever it holds."""
    keeper = measured.Keeper(tmp_path, of="x")
    keeper.add(
        measured.Measured(
            indices=torch.zeros(1, dtype=torch.int64),
            features=torch.zeros(1, 3),
            cosines=torch.zeros(1),
            grid=torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
            seen=[],
        )
    )
    keeper.flush()
    [path] = tmp_path.iterdir()
    save_file({**load_file(path), name: value}, path, {"of": "x", "seen": seen})
    told: list[str] = []
    assert keeper.kept(told.append) is None
    assert len(told) == 1 and "is damaged" in told[0] and not path.exists()


def test_a_grids_prompts_of_any_kind(tmp_path):
    for text in ("{}", '{"prompts": 5}', "[]"):
        (tmp_path / "samples_0000000004.json").write_text(text)
        assert not evaluate._shows_own_prompts(tmp_path, 4, ["a"])


def test_a_first_look_is_not_recorded(run):
    folder, settings = run
    before = (folder / "result_0.txt").read_bytes()
    [told] = whole(folder, settings, Wanted(checkpoint=64, num_prompts=4))
    assert told.startswith("64 samples: FID") and "(n = 4)" in told
    assert not (folder / "scores.jsonl").exists()
    assert (folder / "result_0.txt").read_bytes() == before


def test_scores_of_the_average_stand_apart(run, monkeypatch):
    folder, settings = run
    before, drawn, draw = (folder / "result_0.txt").read_bytes(), [], Evaluator.draw

    def noted(self, weights, *arguments, **options):
        drawn.append(weights)
        return draw(self, weights, *arguments, **options)

    monkeypatch.setattr(Evaluator, "draw", noted)
    whole(folder, settings, Wanted(checkpoint=64, ema=True))
    average = load_component(folder / "checkpoints" / "samples_0000000064", "ema")
    assert all(torch.equal(drawn[0][name], average[name]) for name in average)
    assert [line["samples"] for line in read_scores(folder, ema=True)] == [64]
    assert not (folder / "scores.jsonl").exists()
    assert (folder / "result_0.txt").read_bytes() == before
    assert len(list((folder / "samples_ema").glob("*.png"))) == 1


def test_scores_of_one_run_have_one_precision(run):
    folder, settings = run
    whole(folder, settings, Wanted(checkpoint=32, precision="bf16"))
    [first] = scores_of(folder)
    assert first["precision"] == "bf16"
    assert scores_table(folder).title.endswith(" (drawn in bf16)")
    with pytest.raises(UserError, match=r"scores\.jsonl: holds scores in bf16, beside .* fp32"):
        whole(folder, settings)
    whole(folder, settings, Wanted(checkpoint=32, num_prompts=4))
    assert scores_of(folder) == [first]
    whole(folder, settings, Wanted(precision="bf16"))
    assert {line["precision"] for line in scores_of(folder)} == {"bf16"}
    (folder / "scores.jsonl").unlink()
    whole(folder, settings, Wanted(checkpoint=32))
    assert scores_of(folder)[0]["fid"] != first["fid"]


def test_lines_without_a_precision_have_the_runs(run):
    folder, settings = run
    whole(folder, settings, Wanted(checkpoint=32))
    [line] = read_scores(folder)
    del line["precision"]
    (folder / "scores.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="holds scores in fp32, beside which none in bf16"):
        whole(folder, settings, Wanted(precision="bf16"))
    assert whole(folder, settings, Wanted(checkpoint=64))


def test_the_checkpoint_that_is_wanted(run):
    folder, settings = run
    with pytest.raises(CheckpointError, match=r"checkpoint at 33 samples; there: 32, 64$"):
        whole(folder, settings, Wanted(checkpoint=33))
    whole(folder, settings, Wanted(checkpoint=64))
    assert [line["samples"] for line in read_scores(folder)] == [64]


def test_until_one_passes(run):
    folder, settings = run
    evaluation = evaluate.replace(settings.evaluation, fid_target=1e9, clip_target=-1.0)
    settings = evaluate.replace(settings, evaluation=evaluation)
    whole(folder, settings, Wanted(until_passed=True))
    assert [line["samples"] for line in read_scores(folder)] == [32]
    assert whole(folder, settings, Wanted(until_passed=True)) == []


def test_checkpoints_are_taken_as_they_land(run, monkeypatch):
    """The trainer here is a thread that holds the run's lock and moves a checkpoint in."""
    folder, settings = run
    late = folder / "checkpoints" / "samples_0000000064"
    late.rename(folder / "late")
    before = (folder / "result_0.txt").read_bytes()
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    under_way, first_scored = threading.Event(), threading.Event()

    def trainer() -> None:
        with RunLock() as lock:
            lock.take(folder)
            under_way.set()
            assert first_scored.wait(PATIENCE)
            assert (folder / "result_0.txt").read_bytes() == before  # the trainer's alone
            (folder / "late").rename(late)

    thread = threading.Thread(target=trainer)
    thread.start()
    assert under_way.wait(PATIENCE)
    told = []

    def tell(line: str) -> None:
        told.append(line)
        first_scored.set()

    evaluate_run(folder, settings, start_world("cpu"), tell, Wanted(wait_minutes=PATIENCE / 60))
    thread.join()
    assert [line.split(":")[0] for line in told] == ["32 samples", "64 samples"]


def test_nobody_is_waited_for_without_end(run, monkeypatch):
    folder, settings = run
    shutil.rmtree(folder / "checkpoints" / "samples_0000000064")
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    assert len(whole(folder, settings, Wanted(wait_minutes=0.005))) == 1


PROGRAM = """
import os, sys
from pathlib import Path
from sd_perf.distributed.world import start_world, stop_world
from sd_perf.evaluation.evaluate import Wanted, evaluate_run, scores_table
from sd_perf.runs.folder import read_run_config

world, folder = start_world("cpu"), Path(sys.argv[1])
wanted = Wanted(pictures=folder / "pictures")
evaluate_run(folder, read_run_config(folder), world, lambda line: None, wanted)
stop_world()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_score_as_one(run, ranks):
    folder, settings = run
    other = copied(folder)
    whole(folder, settings, Wanted(pictures=folder / "pictures"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, other],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": r, "LOCAL_RANK": r},
        )
        for r in map(str, range(ranks))
    ]
    assert [process.wait(PATIENCE) for process in processes] == [0] * ranks
    assert scores_of(other) == scores_of(folder)
    for path in (folder / "pictures").glob("*.png"):
        assert path.read_bytes() == (other / "pictures" / path.name).read_bytes()
    assert torch.get_num_threads() == 1
