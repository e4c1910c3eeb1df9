"""The run folder: its manifest, what a resumed run may change, moving a run aside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sd_perf.errors import ConfigError, UserError
from sd_perf.runs.folder import (
    config_digest,
    open_run,
    read_manifest,
    read_run_config,
    read_run_id,
    settle_run,
)

PACKAGE = Path(__file__).parents[2] / "sd_perf"


@pytest.fixture
def config(make_config):
    return make_config("runs/run")


@pytest.fixture
def folder(config) -> Path:
    return Path(config.run.dir)


def with_seed(config, seed: int | None):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


def test_manifest(config, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sd-perf", "train", "--run.note", "two words"])
    assert open_run(config, resume=False) == config
    manifest = read_manifest(folder)
    assert manifest["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert read_run_config(folder) == config
    assert re.fullmatch("[0-9a-f]{32}", manifest["run_id"])
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["versions"]["python"] == platform.python_version()
    assert manifest["machine"]["cpus"] >= 1
    [start] = manifest["starts"]
    assert start["command"] == "sd-perf train --run.note 'two words'" and start["time"].endswith(
        "+00:00"
    )
    assert list(folder.iterdir()) == [folder / "run_manifest.json"]  # nothing aside is left


def test_git_sha(config, folder):
    head = subprocess.run(
        ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode != 0:
        pytest.skip("the package does not run from a git checkout")
    open_run(config, resume=False)
    assert read_manifest(folder)["git_sha"].removesuffix("+changes") == head.stdout.strip()


def test_starts_are_appended_on_resume(config, folder, monkeypatch):
    for number in range(3):
        monkeypatch.setattr(sys, "argv", ["sd-perf", "train", str(number)])
        open_run(config, resume=number > 0)
    assert [start["command"] for start in read_manifest(folder)["starts"]] == [
        f"sd-perf train {n}" for n in range(3)
    ]


def test_the_id_is_drawn_once_per_run(config, folder, make_config):
    open_run(config, resume=False)
    first = read_run_id(folder)
    open_run(config, resume=True)
    assert read_run_id(folder) == first
    open_run(config, resume=False, fresh=True)
    assert read_run_id(folder) != first and read_run_id(folder.with_name("run.1")) == first


def test_config_digest(make_config):
    """It changes with what a run computes, and not with where and how long it runs."""
    config = make_config()
    same = make_config("elsewhere", training={"max_samples": 8}, model={"implementation": "fast"})
    assert config_digest(same) == config_digest(config)
    others = [make_config(training={"seed": 1}), make_config(optimizer={"beta_1": 0.5})]
    assert len({config_digest(c) for c in (config, *others)}) == 3


def test_seed_is_drawn_once_and_kept(config, make_config):
    unseeded = with_seed(config, None)
    first = open_run(unseeded, resume=False)
    assert first.training.seed is not None and 0 <= first.training.seed < 2**63
    assert open_run(unseeded, resume=True) == first
    assert (
        open_run(with_seed(make_config("other"), None), resume=False).training.seed
        != first.training.seed
    )


def test_a_given_seed_must_be_the_runs(config):
    open_run(config, resume=False)
    with pytest.raises(ConfigError, match=r"training\.seed: the run in .* has 0, this config 1"):
        open_run(with_seed(config, 1), resume=True)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"num_res_blocks": 2}),
        ("optimizer", {"beta_1": 0.5}),
        ("training", {"global_batch_size": 8}),
        ("data", {"context_tokens": 4}),
    ],
)
def test_what_a_resumed_run_must_not_change(section, change, config, folder, make_config):
    open_run(config, resume=False)
    before = (folder / "run_manifest.json").read_bytes()
    [(key, value)] = change.items()
    was = getattr(getattr(config, section), key)
    with pytest.raises(
        ConfigError,
        match=rf"{section}\.{key}: the run in .* has {was}, this config {value}; .*--run",
    ):
        open_run(make_config("runs/run", **{section: change}), resume=True)
    assert (folder / "run_manifest.json").read_bytes() == before


def test_what_a_resumed_run_may_change(config, make_config):
    open_run(config, resume=False)
    longer = make_config(
        "runs/run", training={"max_samples": 400, "accumulate_steps": 2}, logging={"every_steps": 1}
    )
    assert open_run(longer, resume=True) == longer
    assert read_run_config(Path(config.run.dir)) == longer


def test_a_resumed_run_may_be_faster_but_not_less_precise(config, make_config):
    bf16 = {"training": {"precision": "bf16"}}
    open_run(make_config("runs/run", **bf16), resume=False)
    speed = {"implementation": "fast", "activation_checkpointing": True, "compile": True}
    faster = make_config("runs/run", model=speed, **bf16)
    assert open_run(faster, resume=True) == faster
    with pytest.raises(
        ConfigError, match=r"precision\.text: the run in .* has None, this config 'fp8_native'"
    ):
        open_run(
            make_config("runs/run", model=speed, precision={"text": "fp8_native"}, **bf16),
            resume=True,
        )


@pytest.mark.parametrize(
    "trace", ["run_manifest.json", "metrics.jsonl", "checkpoints/samples_0000000004"]
)
def test_a_folder_that_holds_a_run_is_refused(trace, config, folder):
    path = folder / trace
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UserError, match=r"holds a run already; .*--resume.*--fresh.*--run\.dir"):
        open_run(config, resume=False)
    assert [entry.name for entry in folder.iterdir()] == [trace.split("/")[0]]


def test_checkpoints_without_a_manifest_are_not_resumed(config, folder):
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run folder \(no run_manifest\.json\)"):
        open_run(config, resume=True)


def test_other_files_in_the_folder_stay(config, folder):
    folder.mkdir(parents=True)
    (folder / "slurm-17.out").write_text("queued")
    open_run(config, resume=False, fresh=True)
    assert (folder / "slurm-17.out").read_text() == "queued" and read_run_config(folder) == config


@pytest.mark.parametrize("text", ["", '{"config"', "[]", '{"starts": []}', '{"config": {}}'])
def test_damaged_manifest(text, config, folder):
    folder.mkdir(parents=True)
    (folder / "run_manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"run_manifest\.json: .*restore it"):
        open_run(config, resume=True)


def test_manifest_of_another_version(config, folder):
    open_run(config, resume=False)
    manifest = read_manifest(folder)
    manifest["config"]["model"]["colour"] = "red"
    (folder / "run_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"run_manifest\.json: model\.colour: unknown key"):
        open_run(config, resume=True)


def test_settling_writes_nothing(config, folder):
    assert settle_run(with_seed(config, None), resume=False).training.seed is not None
    assert not folder.parent.exists()


def test_fresh_moves_earlier_runs_aside(config, folder, capsys):
    (folder.parent / "run.2").mkdir(parents=True)  # not ours: its number is taken
    for note in ("first", "second", "third"):
        noted = dataclasses.replace(config, run=dataclasses.replace(config.run, note=note))
        open_run(noted, resume=False, fresh=True)
    notes = {
        path.name: read_run_config(path).run.note
        for path in sorted(folder.parent.glob("run*/"))
        if path.name != "run.2"
    }
    assert notes == {"run": "third", "run.1": "first", "run.3": "second"}
    assert list((folder.parent / "run.2").iterdir()) == []
    assert len(read_manifest(folder)["starts"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: the earlier run is now {folder}.1",
        f"{folder}: the earlier run is now {folder}.3",
    ]


def write_state(folder: Path, samples: int) -> Path:
    path = folder / "checkpoints" / f"samples_{samples:010d}" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"samples": samples}))
    return path


def test_fresh_takes_another_config_and_moves_all_of_a_run(config, folder, make_config):
    open_run(config, resume=False)
    state = write_state(folder, config.training.max_samples)
    other = make_config("runs/run", model={"num_res_blocks": 2})
    assert open_run(other, resume=False, fresh=True) == other
    assert (folder.parent / "run.1" / state.relative_to(folder)).is_file()
    assert not (folder / "checkpoints").exists()


def test_fresh_refuses_an_unfinished_run(config, folder):
    open_run(config, resume=False)
    write_state(folder, 40)
    with pytest.raises(
        UserError, match=r"holds an unfinished run \(40 of 200 samples\); continue it with --resume"
    ):
        open_run(config, resume=False, fresh=True)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_fresh_renames_a_link_and_not_what_it_names(config, folder):
    elsewhere = folder.parent.parent / "scratch"
    elsewhere.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)
    open_run(config, resume=False)
    open_run(config, resume=False, fresh=True)
    assert (folder.parent / "run.1").readlink() == elsewhere and not folder.is_symlink()


def test_fresh_and_resume_exclude_each_other(config, folder):
    open_run(config, resume=False)
    with pytest.raises(UserError, match=r"--resume .*--fresh .*give one of them"):
        open_run(config, resume=True, fresh=True)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_fresh_from_within_the_run_is_refused(config, folder, monkeypatch):
    open_run(config, resume=False)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="from within"):
        open_run(config, resume=False, fresh=True)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_unwritable(config, folder):
    folder.parent.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"runs/run cannot be written \(.*\); .*--run\.dir"):
        open_run(config, resume=False)


def test_full_disk_keeps_the_manifest(mount_tmpfs, make_config):
    config = make_config("disk/run")
    disk = mount_tmpfs("size=64k")
    folder = disk / "run"
    open_run(config, resume=False)
    with contextlib.suppress(OSError), (disk / "all the rest").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    before = (folder / "run_manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        open_run(config, resume=True)
    assert (folder / "run_manifest.json").read_bytes() == before
    assert list(folder.iterdir()) == [folder / "run_manifest.json"]
