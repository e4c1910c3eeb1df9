"""slurm/sbatch.sh: what it submits, and what it refuses before anything is submitted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sd_perf.cluster.submit import file_system
from tests.small_run import TREE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def submit(preset, tmp_path):
    """The command's arguments, with options added or overridden."""

    def words(*options: object) -> list[object]:
        fixed = ["--config", preset, "--results-dir", tmp_path / "results", "--log-dir", tmp_path]
        return ["cluster", "submit", *fixed, "--num-nodes", 2, *options]

    return words


def test_what_is_submitted(submit, fake_slurm, sd_perf, tmp_path):
    submitted = fake_slurm()
    code, output, errors = sd_perf(*submit("--account", "me", "--exclude", "n7"))
    assert code == 0, errors
    tested, command = submitted.read_text().splitlines()
    assert "--test-only" in tested
    words = command.split()
    script = words.index(str(ROOT / "slurm/srun.sh"))
    for option in (
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=04:00:00",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--account=me",
        "--exclude=n7",
    ):
        assert option in words[:script]
    assert words[script + 1] == "job" and "submitted job 2" in output
    assert "not evaluated" in output and "no container" in output


def test_the_dry_run_submits_nothing(submit, fake_slurm, sd_perf, tmp_path):
    submitted = fake_slurm()
    code, output, _ = sd_perf(*submit("--dry-run", "--trials", 10))
    assert code == 0 and "--array=0-9" in output and "--seed 0" in output
    assert not submitted.exists() and not (tmp_path / "results").exists()


def test_containers(submit, fake_slurm, sd_perf, tmp_path):
    fake_slurm(help="      --container-image=[USER@][REGISTRY#]IMAGE")
    image = ("--container", "registry/stable_diffusion", "--mounts", "/a:/b")
    code, output, errors = sd_perf(*submit("--dry-run", *image))
    assert code == 0, errors
    assert "in registry/stable_diffusion" in output
    assert "--container registry/stable_diffusion --mounts /a:/b" in output


def test_a_container_has_what_is_named(submit, fake_slurm, sd_perf, tmp_path, monkeypatch):
    """Results, checkpoint and the config's files, once; not what a mount or the folder has."""
    fake_slurm(help="      --container-image=[USER@][REGISTRY#]IMAGE")
    for name in ("here", "data/moments", "weights"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights/sd.ckpt").touch()
    data = {**TREE["data"], "format": "moments", "context": "precomputed"}
    data["path"] = f"{tmp_path}/data/moments"
    preset = tmp_path / "here/tiny.yaml"
    preset.write_text(yaml.safe_dump({**TREE, "data": data}))
    monkeypatch.chdir(tmp_path / "here")
    options = ["--config", preset, "--container", "image", "--checkpoint"]
    options += [tmp_path / "weights/sd.ckpt", "--dry-run"]

    def mounts(*more: object) -> list[str]:
        code, output, errors = sd_perf(*submit(*options, *more))
        assert code == 0, errors
        return re.findall(r"--mounts (\S+)", output.replace(f"{tmp_path}", ""))

    assert mounts() == ["/data/moments:/data/moments,/results:/results,/weights:/weights"]
    asked = f"/lustre:{tmp_path}/data,{tmp_path}/weights:{tmp_path}/weights:ro"
    [mounted] = mounts("--mounts", asked)
    assert mounted == "/lustre:/data,/weights:/weights:ro,/results:/results"


def make_run(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    manifest = {"config": {"training": {"seed": seed}}, "starts": []}
    (folder / "run_manifest.json").write_text(json.dumps(manifest))


def test_a_run_goes_on(submit, fake_slurm, sd_perf, tmp_path):
    fake_slurm()
    make_run(tmp_path / "earlier/2024_tiny", seed=5)
    code, output, errors = sd_perf(*submit("--dry-run", "--resume", tmp_path / "earlier/2024_tiny"))
    assert code == 0, errors
    assert f"--run-dir {tmp_path}/earlier/2024_tiny " in output
    assert "--seed" not in output and "--array" not in output


def test_trials_go_on(submit, fake_slurm, sd_perf, tmp_path):
    """All, or one; the seeds are those that they have, though trial 0 may never have begun."""
    fake_slurm()
    array = tmp_path / "earlier/2024_tiny"
    for trial in (1, 3):
        make_run(tmp_path / f"earlier/2024_tiny_trial_{trial}", seed=70 + trial)
    _, output, _ = sd_perf(*submit("--dry-run", "--resume", array, "--trials", 4))
    assert "--array=0-3" in output and f"--run-dir {array} " in output and "--seed 70" in output
    _, output, _ = sd_perf(*submit("--dry-run", "--resume", f"{array}_trial_3"))
    assert "--array=3" in output and f"--run-dir {array} " in output and "--seed 70" in output


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("none", (), "none holds no run to go on with"),
        ("2024_tiny", (), "is an array of trials; give --trials, or"),
        ("2024_tiny_trial_3", ("--trials", 4), "is one trial; leave out --trials"),
        ("damaged", ("--trials", 2), "does not tell the trial's seed"),
    ],
)
def test_no_run_to_go_on_with(name, options, told, submit, fake_slurm, refused, tmp_path):
    submitted = fake_slurm()
    make_run(tmp_path / "2024_tiny_trial_3", seed=73)
    (tmp_path / "damaged_trial_0").mkdir()
    (tmp_path / "damaged_trial_0/run_manifest.json").write_text("{}")
    assert told in refused(*submit("--resume", tmp_path / name, *options))
    assert not submitted.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--num-nodes", 3), "--num-nodes: 3 cannot be used; the partition has 2 nodes"),
        (("--num-nodes", 0), "--num-nodes: 0 cannot be used"),
        (("--gpus-per-node", 9), "2 nodes of 9 GPUs cannot be had"),
        (("--partition", "gpu"), "--partition: 'gpu' has no nodes; this cluster has all, main"),
        (("--walltime", "00:05:00"), "the run is told to save 300 s before its end"),
        (("--walltime", "2-00:00:00"), "more than the partition's 86,400 s"),
        (("--walltime", "soon"), "--walltime: 'soon' cannot be used"),
        (("--checkpoint", "/no/sd.ckpt"), "--checkpoint: /no/sd.ckpt: no such file"),
        (("--container", "image"), "neither apptainer nor singularity is on PATH"),
        (("--container", "./no.sqsh"), "--container: ./no.sqsh: no such image"),
        (("--trials", 0), "--trials: 0 cannot be used"),
        (("--config", "no.yaml"), "no.yaml: no such config file"),
    ],
)
def test_what_cannot_be(options, told, submit, fake_slurm, refused):
    submitted = fake_slurm()
    assert told in refused(*submit(*options))
    assert not submitted.exists()


def test_nodes_whose_gpus_differ(submit, fake_slurm, refused):
    submitted = fake_slurm(gpus=(8, 8, 4))
    assert "by GPUs, are 2 of 8, 1 of 4" in refused(*submit("--num-nodes", 3))
    assert not submitted.exists()


def test_a_disk_of_one_machine(submit, fake_slurm, refused, monkeypatch):
    submitted = fake_slurm(host="elsewhere")
    monkeypatch.setattr("sd_perf.cluster.submit.file_system", lambda folder, mounts: "tmpfs")
    assert "is on a tmpfs of" in refused(*submit())
    assert not submitted.exists()


def test_results_of_others(submit, fake_slurm, refused, tmp_path):
    submitted = fake_slurm()
    (tmp_path / "results/2024_tiny_trial_0").mkdir(parents=True)
    assert "holds trials already" in refused(*submit("--trials", 3))
    (tmp_path / "results/run_manifest.json").touch()
    assert "is the folder of a run" in refused(*submit())
    assert not submitted.exists()


def test_what_slurm_refuses(submit, fake_slurm, refused):
    fake_slurm(fault="Batch job submission failed: Invalid account")
    assert refused(*submit()).endswith("sbatch: Batch job submission failed: Invalid account")


def test_no_slurm(submit, refused, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sinfo: is not on PATH" in refused(*submit())


def test_the_file_system_of_a_folder(tmp_path):
    mounts = "root / ext4 rw\nnfs /data nfs4 rw\ntmp /data/my\\040disk tmpfs rw\n"
    assert file_system(Path("/data/my disk/results"), mounts) == "tmpfs"
    assert file_system(Path("/data/my"), mounts) == "nfs4"
    assert file_system(Path("/home"), mounts) == "ext4"


def test_hosts_need_no_torch(preset, fake_slurm, tmp_path):
    """Where jobs run in containers, sbatch.sh and srun.sh run beside the scheduler without it."""
    fake_slurm()
    words = ["cluster", "submit", "--dry-run", "--config", str(preset), "--num-nodes", "2"]
    words += ["--results-dir", str(tmp_path / "results")]
    code = f"""
import sys
class NoTorch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("no torch here")
sys.meta_path.insert(0, NoTorch)
import sd_perf.cluster.job
from sd_perf.cli import main
main({words})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "sbatch --parsable" in done.stdout, done.stderr
