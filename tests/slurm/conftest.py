"""One cluster of two nodes for all tests, and the small world that its jobs train in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from benchmarks.virtual_cluster import VirtualCluster
from sd_perf.cli import main
from sd_perf.errors import UserError
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny world's data, and `only_n1`, which is empty on n2."""
    folder = tmp_path_factory.mktemp("world")
    preset = write_preset(folder, "prepare")
    for command in (
        f"data scenes --output {folder}/scenes --samples 128 --seed 1 --shards",
        f"data scenes --output {folder}/prompts --samples 8 --seed 3",
        f"data statistics --config {preset} --images {folder}/prompts",
        f"data prepare --config {preset} --images {folder}/scenes --samples-per-shard 128"
        f" --autoencoder {ROOT}/assets/tiny/autoencoder.safetensors",
    ):
        with pytest.raises(SystemExit) as left:
            main(command.split())
        assert left.value.code == 0
    shutil.copytree(folder / "moments", folder / "only_n1")
    return folder


def write_preset(folder: Path, name: str, **changes: dict) -> Path:
    """The smoke preset, shortened to 40 steps on this world's data, with sections changed."""
    tree: dict = {
        "data": {"path": f"{folder}/moments"},
        "training": {"max_samples": 640, "global_batch_size": 16, "cpu_threads": 1},
        "optimizer": {"decay_steps": 0, "warmup_steps": 4},
        "checkpoint": {"every_samples": 160},
        "logging": {"every_steps": 2},
        "sampling": {"steps": 2},
        "evaluation": {
            "prompts": f"{folder}/prompts/captions.jsonl",
            "num_prompts": 8,
            "statistics": f"{folder}/statistics.npz",
        },
        "mlperf": {"division": "none"},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"extends": str(ROOT / "configs/smoke.yaml"), **tree}))
    return path


@pytest.fixture(scope="session")
def cluster(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    cluster = VirtualCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up(hidden=world / "only_n1")
    except UserError as missing:
        pytest.skip(str(missing))
    yield cluster
    cluster.down()


@dataclass
class Submitted:
    """A job that slurm/sbatch.sh submitted."""

    cluster: VirtualCluster
    number: str
    evaluation: str
    """number of the job that evaluates it; empty where there is none"""
    results: Path

    @property
    def log(self) -> str:
        logs = sorted((self.results / "logs").glob(f"*_{self.number}.log"))
        return "".join(path.read_text(errors="replace") for path in logs)

    @property
    def run(self) -> Path:
        [manifest] = self.results.glob("*/run_manifest.json")
        return manifest.parent

    def wait_for_step(self, samples: int) -> None:
        """Until the run has logged this position."""
        line = re.compile(rf"^{samples}/\d+ samples", re.MULTILINE)
        self.cluster.wait(lambda: bool(line.search(self.log)), f"{samples} samples", PATIENCE)

    def wait(self, *states: str) -> None:
        """Until the job has ended, in one of these states."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        state = lambda: self.cluster.field(self.number, "JobState")  # noqa: E731
        self.cluster.wait(lambda: state() in ended, f"the end of the job\n{self.log}", 2 * PATIENCE)
        assert state() in (states or ("COMPLETED",)), self.log


@pytest.fixture
def sbatch(cluster: VirtualCluster, tmp_path: Path) -> Callable[..., Submitted]:
    """sbatch(preset, "--num-nodes", 2, ...): submit with the project's own script."""

    def submit(preset: Path, *options: object) -> Submitted:
        words = ["--config", preset, "--results-dir", tmp_path, "--log-dir", tmp_path / "logs"]
        words += ["--walltime", "00:10:00", "--gpus-per-node", 1]
        output = cluster.call(ROOT / "slurm/sbatch.sh", *words, *options)
        numbers = re.findall(r"submitted job (\d+)", output)
        return Submitted(cluster, *(*numbers, "")[:2], tmp_path)

    return submit
