"""Bad input at the command line: one sentence of what, where and what to do; exit 2; nothing saved
is changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from sd_kernels.errors import KernelError
from sd_perf.data.order import SampleOrder
from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.data.shards import ShardWriter
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from tests.conftest import only_sentence
from tests.data.test_samples import Bomb, npy
from tests.small_run import TREE, start_train, train_here

SHORT = {"training": {**TREE["training"], "max_samples": 8}, "checkpoint": {"every_samples": 4}}
AUTOENCODER = Path(__file__).parent.parent / "assets" / "tiny" / "autoencoder.safetensors"
TEXT_TINY = str(Path(__file__).parent.parent / "configs" / "text_tiny.json")
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


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "tiny.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / "shards"


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


# --------------------------------------------------------------------------------------------------
# the config file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainig: {max_samples: 4}", ["trainig: unknown key", "did you mean training?"]),
        (
            "training: {max_sample: 4}",
            ["training.max_sample: unknown key", "did you mean training.max_samples?"],
        ),
        (
            "training: {qwertyuiop: 4}",
            ["training.qwertyuiop: unknown key", "known here: global_batch_size"],
        ),
        ("training: {max_samples: many}", ["training.max_samples: 'many'", "a whole number"]),
        ("training: {max_samples: 4.5}", ["training.max_samples: 4.5", "a whole number"]),
        ("training: {deterministic: 1}", ["training.deterministic: 1", "true or false"]),
        ("training: {precision: fp16}", ["training.precision: 'fp16'", "one of fp32, bf16"]),
        ("optimizer: {epsilon: [1]}", ["optimizer.epsilon: [1]", "a number"]),
        ("optimizer: {epsilon: 1" + 400 * "0" + "}", ["optimizer.epsilon: 1", "a number"]),
        ("model: {channel_mult: 3}", ["model.channel_mult: 3", "a list"]),
        ("run: {dir: 7}", ["run.dir: 7", "text"]),
        ("training: 4", ["training: 4", "a section of keys"]),
        ("training:", ["training: None", "a section of keys"]),
        ("training: {max_samples: 0}", ["training.max_samples: 0", "at least 1"]),
        ("optimizer: {beta_2: 1.0}", ["optimizer.beta_2: 1.0", "in [0, 1)"]),
        (
            "optimizer: {base_learning_rate: .nan}",
            ["optimizer.base_learning_rate: nan", "positive"],
        ),
        (
            "model: {num_head_channels: 48}",
            ["model.num_head_channels: 48", "a divisor of every level's channels"],
        ),
        ("data: {format: synthetic, latent_size: 9}", ["data.latent_size: 9", "a multiple of 8"]),
        ("data: {format: moments}", ["data.path: ''", "data.format to synthetic"]),
        ("kernels: {geglo: triton}", ["kernels.geglo: unknown key", "did you mean kernels.geglu?"]),
        ("kernels: {geglu: 4}", ["kernels.geglu: 4", "text"]),
        ("checkpoint: {keep: 0}", ["checkpoint.keep: 0", "none to keep all"]),
        ("training: [", ["cannot be read as YAML", "line 1"]),
        ("- training", ["must hold sections", "not a list"]),
        ("\0", ["cannot be read as YAML"]),
        ("extends: absent.yaml", ["absent.yaml: no such config file", "bad.yaml extends it"]),
        ("extends: bad.yaml", ["bad.yaml: extends itself", "take `extends` out"]),
        ("extends: middle.yaml", ["bad.yaml: extends itself"]),
    ],
)
def test_config_file(text, parts, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "middle.yaml").write_text("extends: bad.yaml")
    matches(refused("train", "--config", "bad.yaml"), "bad.yaml", *parts)
    assert len(list(tmp_path.iterdir())) == 2


def test_config_file_is_missing_or_no_text(tmp_path, refused):
    matches(
        refused("train", "--config", tmp_path / "no.yaml"),
        tmp_path / "no.yaml",
        "no such config file",
        "configs/",
    )
    matches(refused("train", "--config", tmp_path), "no such config file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for command in (["train"], ["data", "prepare"], ["data", "statistics"]):
        matches(
            refused(*command, "--config", tmp_path / "binary.yaml"),
            "binary.yaml: cannot be read as YAML",
        )


# --------------------------------------------------------------------------------------------------
# the options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--training.max-sample", "4"],
            ["--training.max-sample", "Perhaps you meant", "--training.max-samples INT"],
        ),
        (["--rezume"], ["--rezume", "Perhaps you meant", "--resume"]),
        (["--training.max-samples", "many"], ["--training.max-samples", "'many'"]),
        (["--training.precision", "fp16"], ["--training.precision", "'fp16'", "'fp32', 'bf16'"]),
        (["--model.channel-mult", "1", "x"], ["--model.channel-mult"]),
        (["--config"], ["--config"]),
    ],
)
def test_options_that_do_not_parse(options, parts, preset, run, sd_perf):
    code, _, errors = sd_perf("train", "--config", preset, "--run.dir", run, *options)
    assert code == 2 and "Traceback" not in errors and not run.exists()
    matches(errors, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--training.max-samples", "0"], ["training.max_samples: 0", "at least 1"]),
        (["--optimizer.beta-1", "2"], ["optimizer.beta_1: 2.0", "in [0, 1)"]),
        (
            ["--training.accumulate-steps", "3"],
            ["training.global_batch_size: 4", "a multiple of", "1 x 3"],
        ),
        (
            ["--sampling.steps", "2000"],
            ["sampling.steps: 2000", "at most diffusion.num_timesteps (1000)"],
        ),
        (
            ["--kernels.geglu", "triton"],
            ["kernels.geglu: 'triton'", "auto or reference", "is 'plain'"],
        ),
        (["--kernels.strict"], ["kernels.strict: True", "is 'plain'"]),
        (
            ["--precision.text", "fp8_native"],
            ["precision.text: 'fp8_native'", "bf16, since", "is 'plain'"],
        ),
        (
            ["--kernels.geglu", "triton", "--dry-run"],
            ["kernels.geglu: 'triton'", "auto or reference", "is 'plain'"],
        ),
        (["--mlperf.division", "closed", "--dry-run"], ["is not allowed in the closed division"]),
        (
            [*FAST, "--kernels.geglu", "tritn", "--dry-run"],
            ["kernels.geglu: 'tritn'", "did you mean 'triton'?"],
        ),
        (["--dry-run", "--ranks", "0"], ["--ranks: 0 cannot be used; it must be at least 1"]),
        (["--dry-run", "--ranks", "-2"], ["--ranks: -2 cannot be used; it must be at least 1"]),
        (["--resume", "--fresh"], ["--resume", "--fresh", "give one of them"]),
    ],
)
def test_options_that_cannot_be_used(options, parts, preset, run, refused):
    matches(refused("train", "--config", preset, "--run.dir", run, *options), *parts)
    assert not run.exists()


def test_dry_run_for_a_declared_gpu(preset, run, sd_perf):
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        "--dry-run",
        *FAST,
        "--kernels.geglu",
        "triton",
    ]
    code, output, _ = sd_perf(*command, "--target", "h100", "--json")
    facts = json.loads(output)
    assert (
        code == 0 and facts["target"] == "H100" and facts["kernels"]["geglu"]["backend"] == "triton"
    )
    assert set(facts["linear_layers"].values()) == {"fp32"}
    code, output, _ = sd_perf(*command, "--target", "a100")
    assert code == 0 and "kernels on A100" in output and "named in the config" in output
    code, _, errors = sd_perf(*command, "--target", "h101")
    assert code == 2 and "'h101'" in errors and not run.exists()


def test_an_operators_error(preset, run, refused, monkeypatch):
    def refuse(*_):
        raise KernelError("geglu: got torch.int32; takes float32, bfloat16 or float16")

    monkeypatch.setattr("sd_perf.tools.estimate.dry_run.dry_run", refuse)
    matches(
        refused("train", "--config", preset, "--run.dir", run, "--dry-run"),
        "geglu: got torch.int32",
    )


def test_unknown_command(sd_perf):
    code, _, errors = sd_perf("trian")
    assert code == 2 and "trian" in errors and "Traceback" not in errors


# --------------------------------------------------------------------------------------------------
# the data


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


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ["shards is not a folder", "data.path must name"]),
        (
            lambda shards: (shards / "00000.tar").unlink(),
            ["shards is empty", "data.path must name"],
        ),
        (
            lambda shards: (shards / "00000.tar").rename(shards / "00000.zip"),
            ["shards holds no *.tar", "data.path"],
        ),
        (
            lambda shards: cut(shards / "00000.tar"),
            ["00000.tar cannot be read as a tar file (unexpected end", "again"],
        ),
        (
            lambda shards: os.truncate(shards / "00000.tar", 512),
            ["00000.tar cannot be read", "again"],
        ),
        (
            lambda shards: (shards / "00000.tar").write_bytes(b"junk"),
            ["00000.tar cannot be read as a tar", "again"],
        ),
        *[
            (
                lambda shards, e=e: write_tar(shards / "00000.tar", sample_files(**{e: None})),
                ["000000003", f".{e}", do],
            )
            for e, do in [
                ("npy", "needs"),
                ("txt", "needs"),
                ("context.npy", "set data.context to open_clip"),
            ]
        ],
    ],
    ids=[
        "no folder",
        "empty",
        "no tar",
        "cut",
        "cut in a header",
        "junk",
        "no npy",
        "no txt",
        "no context",
    ],
)
def test_shards(spoil, parts, preset, run, shards, refused):
    """Told before the run folder is made."""
    shards.mkdir()
    write_tar(shards / "00000.tar", sample_files())
    spoil(shards)
    matches(refused("train", "--config", preset, "--run.dir", run, *data_options(shards)), *parts)
    assert not run.exists()


def with_value(value: float) -> np.ndarray:
    moments = MOMENTS.copy()
    moments[0, 5, 3, 3] = value
    return moments


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"npy": npy(MOMENTS[:, :4])}, "moments has shape (1, 4, 8, 8), not (1, 8, 8, 8)"),
        ({"npy": npy(MOMENTS.astype(np.float16))}, "moments has dtype float16, not float32"),
        (
            {"npy": npy(np.array([Bomb()], dtype=object), allow_pickle=True)},
            "moments holds pickled objects, which are",
        ),
        ({"npy": npy(with_value(np.nan))}, "moments has values that are NaN or infinite"),
        ({"npy": npy(with_value(np.inf))}, "moments has values that are NaN or infinite"),
        ({"context.npy": npy(CONTEXT[:2])}, "context has shape (2, 16), not (3, 16)"),
        ({"txt": b""}, "caption is empty"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"txt": 10240 * b"x"}, "caption has 10240 bytes, more than 4096"),
    ],
)
def test_samples(bad, reason, preset, run, shards, refused):
    shards.mkdir()
    write_tar(shards / "00000.tar", sample_files(**bad))
    sentence = refused("train", "--config", preset, "--run.dir", run, *data_options(shards))
    matches(
        sentence,
        f"{shards}: sample 000000003 in 00000.tar: {reason}",
        "mend it, or set data.max_bad_samples",
    )
    assert not (run / "checkpoints").exists()


def write_shards(folder: Path, bad: set[int] = frozenset(), num: int = 16) -> None:
    with ShardWriter(folder) as writer:
        for number in range(num):
            writer.write(
                np.full((8, 8, 8), np.nan if number in bad else 0.1),
                f"caption {number}",
                None,
                CONTEXT,
            )


def test_more_bad_samples_than_allowed(preset, run, shards, refused, sd_perf):
    order = SampleOrder(seed=0, num_samples=16)
    write_shards(shards, {order.sample(position) for position in (1, 5, 6)})
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        *data_options(shards),
        "--data.max-bad-samples",
    ]
    sentence = refused(*command, 1)
    matches(
        sentence,
        "3 bad samples, more than data.max_bad_samples (1), the last 0000000",
        "NaN",
        "raise the limit",
    )
    assert (run / "bad_samples.jsonl").read_text().count("\n") == 3
    assert newest(run).name == "samples_0000000004"
    assert sd_perf(*command, 3, "--resume")[0] == 0
    before = saved(run)
    longer = ["--resume", "--training.max-samples", 12]
    matches(
        refused(*command, 1, *longer), "3 bad samples, more than data.max_bad_samples (1); mend"
    )
    assert saved(run / "checkpoints") == {
        k.removeprefix("checkpoints/"): v for k, v in before.items() if "check" in k
    }


def test_text_encoder_weights(preset, run, shards, refused, tmp_path):
    write_shards(shards)
    options = [
        *data_options(shards)[:-1],
        "open_clip",
        "--text-encoder.model",
        TEXT_TINY,
        "--text-encoder.weights",
    ]
    command = ["train", "--config", preset, "--run.dir", run, *options]
    matches(
        refused(*command, tmp_path / "absent.bin"),
        "absent.bin: no such file",
        "text_encoder.weights names",
    )
    matches(refused(*command, ""), "text_encoder.weights: ''", "a file of weights")
    matches(
        refused(*command, "random"),
        "model.context_dim: 16 cannot be used",
        "it must be 128, the width of",
    )
    assert not run.exists()


def test_shards_are_written_to_a_named_folder(
    preset, shards, refused, sd_perf, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "scenes", 4, seed=0)
    command = [
        "data",
        "prepare",
        "--config",
        preset,
        "--images",
        tmp_path / "scenes",
        "--autoencoder",
        AUTOENCODER,
    ]
    matches(refused(*command), "data.path: ''", "the folder to write the shards to")
    command += ["--data.path", shards]
    assert sd_perf(*command)[0] == 0
    before = saved(shards)
    matches(refused(*command), "00000.tar exists already", "write to another folder")
    assert saved(shards) == before


# ----------------------------------------------------------------------------------------- run
# folders and checkpoints


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(write_preset(folder / "tiny.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of another model on the same data."""
    folder = tmp_path_factory.mktemp("other")
    train_here(write_preset(folder / "other.yaml", model={"channel_mult": [1, 1]}), folder / "run")
    return newest(folder / "run")


@pytest.fixture
def copied_run(whole_run: Path, run: Path) -> Path:
    shutil.copytree(whole_run, run)
    return run


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


def truncate_tensors(checkpoint: Path, other: Path) -> None:
    cut(checkpoint / "__0_0.distcp")


def truncate_metadata(checkpoint: Path, other: Path) -> None:
    cut(checkpoint / ".metadata")


def truncate_state(checkpoint: Path, other: Path) -> None:
    cut(checkpoint / "state.json")


def another_model(checkpoint: Path, other: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)


@pytest.mark.parametrize("command", ["resume", "export", "sample"])
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (truncate_tensors, ["__0_0.distcp: truncated", "move this checkpoint away"]),
        (truncate_metadata, ["damaged (.metadata: ", "move this checkpoint away"]),
        (
            truncate_state,
            ["not a checkpoint of sd-perf (state.json: ", "move this checkpoint away"],
        ),
        (another_model, [" shape"]),
    ],
)
def test_checkpoint(command, spoil, parts, copied_run, preset, tmp_path, other_checkpoint, refused):
    spoil(newest(copied_run), other_checkpoint)
    before = saved(copied_run)
    sentence = refused(*command_on(copied_run, command, preset, tmp_path / "output"))
    matches(sentence, newest(copied_run), *parts)
    assert saved(copied_run) == before and not (tmp_path / "output").exists()


def test_a_damaged_checkpoint_moved_away(copied_run, preset, tmp_path, sd_perf):
    """What the sentence advises works."""
    newest(copied_run).rename(tmp_path / "damaged")
    code, output, _ = sd_perf(*command_on(copied_run, "resume", preset, tmp_path))
    assert code == 0 and "resuming at sample 4 of 12" in output


@pytest.mark.parametrize("command", ["export", "sample"])
@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("absent", ["absent: no such run, checkpoint or weight file", "check the path"]),
        ("folder", ["folder: holds no complete checkpoint", "give a run folder"]),
        ("moved", ["is no run folder (no run_manifest.json)", "sd-perf train"]),
        ("file", ["file: holds no complete checkpoint", "give a run folder"]),
    ],
)
def test_source_is_no_run(command, source, parts, whole_run, preset, tmp_path, refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    if source == "moved":  # a checkpoint taken out of its run
        shutil.copytree(newest(whole_run), tmp_path / "moved")
    matches(refused(*command_on(tmp_path / source, command, preset, tmp_path / "output")), *parts)
    assert not (tmp_path / "output").exists()


def test_resume_where_there_is_nothing_yet_begins(preset, run, sd_perf):
    """So that a job that is queued again needs one command."""
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", run, "--resume")
    assert (
        code == 0 and "no checkpoint to resume from" in output and "starting at sample 0" in output
    )


def test_resume_of_a_complete_run_does_nothing(copied_run, preset, sd_perf):
    """So that a job that is queued again, or `make resume`, goes on to what comes after
    training."""
    before = saved(copied_run)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", copied_run, "--resume")
    assert (
        code == 0
        and "the run is complete (8 samples)" in output
        and "larger --training.max-samples" in output
    )
    assert saved(copied_run) == before


def test_a_folder_that_holds_a_run(copied_run, preset, refused):
    before = saved(copied_run)
    command = ["train", "--config", preset, "--run.dir", copied_run]
    matches(
        refused(*command), copied_run, "holds a run already", "--resume", "--fresh", "--run.dir"
    )
    sentence = refused(*command, "--resume", "--model.num-res-blocks", 2)
    matches(
        sentence, f"model.num_res_blocks: the run in {copied_run} has 1, this config 2", "--run.dir"
    )
    (copied_run / "run_manifest.json").rename(copied_run.parent / "manifest")
    matches(refused(*command, "--resume"), "is no run folder (no run_manifest.json)")
    (copied_run.parent / "manifest").rename(copied_run / "run_manifest.json")
    assert saved(copied_run) == before


def test_fresh(copied_run, preset, sd_perf):
    before = saved(copied_run)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", copied_run, "--fresh")
    assert code == 0 and "starting at sample 0" in output
    assert f"{copied_run}: the earlier run is now {copied_run}.1" in output.splitlines()
    assert saved(copied_run.with_name("run.1")) == before
    assert newest(copied_run).name == "samples_0000000008"


def test_fresh_moves_nothing_where_the_run_cannot_begin(copied_run, preset, refused):
    refused(
        "train", "--config", preset, "--run.dir", copied_run, "--fresh", *data_options(copied_run)
    )
    assert [path.name for path in copied_run.parent.glob("run*")] == ["run"]


# --------------------------------------------------------------------------------------------------
# the disk


def test_results_folder_below_a_file(preset, tmp_path, whole_run, refused):
    (tmp_path / "file").write_text("kept")
    sentence = refused("train", "--config", preset, "--run.dir", tmp_path / "file" / "run")
    matches(sentence, "file/run cannot be written (Not a directory)", "choose another --run.dir")
    sentence = refused(*command_on(whole_run, "export", preset, tmp_path / "file"))
    matches(
        sentence, "file/unet.safetensors cannot be written (File exists)", "choose another path"
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_read_only_disk(mount_tmpfs, preset, whole_run, refused):
    disk = mount_tmpfs("ro")
    sentence = refused("train", "--config", preset, "--run.dir", disk / "run")
    matches(sentence, disk / "run", "cannot be written (Read-only file system)", "--run.dir")
    matches(refused(*command_on(whole_run, "export", preset, disk)), "cannot be written")


REAL = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)]


@pytest.mark.parametrize("processes", [0, *REAL])
def test_disk_full_in_a_checkpoint(processes, mount_tmpfs, preset, sd_perf, refused):
    """The first of two checkpoints fits. The run stops, keeps it, and goes on once there is
    space."""
    disk = mount_tmpfs("size=20m")
    if processes:
        sentence = fail(preset, disk / "run", processes=processes)
    else:
        sentence = refused("train", "--config", preset, "--run.dir", disk / "run")
    matches(
        sentence,
        "a checkpoint could not be written (",
        "newest complete",
        "samples_0000000004",
        "make room",
    )
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [
        "samples_0000000004"
    ]
    assert load_component(newest(disk / "run"), "model")
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", disk / "run", "--resume")
    assert code == 0 and "resuming at sample 4 of 8" in output
    assert newest(disk / "run").name == "samples_0000000008"


def test_disk_full_in_the_metrics(mount_tmpfs, preset, refused):
    run = mount_tmpfs("size=12k") / "run"
    options = [
        "--training.max-samples",
        2000,
        "--checkpoint.every-samples",
        2000,
        "--logging.every-steps",
        1,
    ]
    sentence = refused("train", "--config", preset, "--run.dir", run, *options)
    matches(
        sentence,
        run / "metrics.jsonl",
        "cannot be written (No space left on device)",
        "make room",
        "--resume",
    )


def test_pictures_are_not_overwritten(tmp_path, run, refused, sd_perf, monkeypatch):
    """The autoencoder alone is made up. The second time is refused before anything is drawn."""
    monkeypatch.setattr(
        "sd_perf.models.sources.read_decoder", lambda path: lambda latents: latents[:, :3].tanh()
    )
    text = {"text_encoder": {"model": TEXT_TINY, "weights": "random"}, "sampling": {"steps": 2}}
    preset = write_preset(tmp_path / "text.yaml", **text, model={"context_dim": 128})
    assert sd_perf("train", "--config", preset, "--run.dir", run)[0] == 0
    command = command_on(run, "sample", preset, tmp_path / "pictures")
    code, output, _ = sd_perf(*command)
    assert code == 0 and output.split() == [str(path) for path in (tmp_path / "pictures").iterdir()]
    before = saved(tmp_path / "pictures")
    matches(refused(*command), "0000_a_cat.png: exists already", "choose another --output")
    assert saved(tmp_path / "pictures") == before
    matches(refused(*command, "--prompt"), "--prompt: give one or more prompts")


# --------------------------------------------------------------------------------------------------
# the arithmetic


@pytest.mark.parametrize("every_samples", [4, 1000])
def test_loss_not_finite(every_samples, preset, run, refused):
    """The first step has rate 0; the second throws the weights away while its own loss is still
    finite."""
    options = [
        "--optimizer.base-learning-rate",
        1e30,
        "--optimizer.warmup-steps",
        1,
        "--optimizer.warmup-start",
        0,
    ]
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        *options,
        "--training.max-samples",
        40,
    ]
    sentence = refused(
        *command, "--checkpoint.every-samples", every_samples, "--logging.every-steps", 1
    )
    matches(
        sentence,
        "not finite after",
        "this state was not saved",
        "lower optimizer.base_learning_rate",
    )
    if every_samples == 4:
        matches(
            sentence, "weights or optimizer moments are not finite after 8 samples", newest(run)
        )
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["samples_0000000004"]
        assert all(
            tensor.isfinite().all() for tensor in load_component(newest(run), "model").values()
        )
    else:
        matches(sentence, "loss is not finite", "there is no complete checkpoint yet")
        assert not (run / "checkpoints").exists()


# --------------------------------------------------------------------------------------------------
# real processes


def fail(preset: Path, run: Path, *options: object, processes: int = 1) -> str:
    """The one sentence of a run that fails, of whatever number of processes; a hang fails."""
    process = start_train(preset, run, *map(str, options), processes=processes)
    errors = process.communicate(timeout=180)[1]
    if processes == 1:
        assert process.returncode == 2, errors
        return only_sentence(errors)
    assert process.returncode == 1, errors  # torchrun's own, which prints a traceback of its own
    assert not any(
        "sd_perf/" in line for line in errors.splitlines() if line.startswith("  File")
    ), errors
    return only_sentence(
        "".join(line for line in errors.splitlines(keepends=True) if line.startswith("sd-perf:"))
    )


def test_process(preset, run, tmp_path):
    matches(
        fail(preset, run, *data_options(tmp_path / "absent")),
        "absent is not a folder; data.path must name",
    )
    matches(fail(tmp_path / "no.yaml", run), "no.yaml: no such config file")
    assert not run.exists()


@pytest.mark.slow
def test_two_processes_and_a_batch_that_does_not_divide(preset, run):
    sentence = fail(preset, run, "--training.global-batch-size", 5, processes=2)
    matches(
        sentence, "training.global_batch_size: 5", "a multiple of ranks x accumulate_steps = 2 x 1"
    )
    assert not run.exists()


def test_two_processes_and_a_bad_sample_on_the_second(preset, run, shards):
    """Position 5 is of the second step and the second rank; the first rank must not wait for it."""
    write_shards(shards, {SampleOrder(seed=0, num_samples=16).sample(5)})
    sentence = fail(preset, run, *data_options(shards), processes=2)
    matches(
        sentence,
        f"sd-perf: rank 1: {shards}: sample 0000000",
        "NaN or infinite",
        "data.max_bad_samples",
    )
    assert newest(run).name == "samples_0000000004"


def test_two_processes_and_no_config(run, tmp_path):
    matches(fail(tmp_path / "no.yaml", run, processes=2), "no.yaml: no such config file")


def test_debug_adds_the_traceback(tmp_path, sd_perf):
    code, _, errors = sd_perf("train", "--config", tmp_path / "no.yaml", "--debug")
    assert code == 2 and "Traceback (most recent call last)" in errors and "presets.py" in errors
    only_sentence(errors.splitlines()[-1])
