"""A run of the soak: started, killed in one of three ways, continued, swept up."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.soak_world import PROCESSES, Process, World, end_all, processes, wait
from benchmarks.virtual_cluster import VirtualCluster
from sd_perf.tools.results import REPOSITORY

RANK, LAUNCHER, NODE = WAYS = ("rank", "launcher", "slurm-node")
GONE_SECONDS = {RANK: 20.0, LAUNCHER: 20.0, NODE: 60.0}
"""after a kill, until what still lives counts as an orphan: ranks that lost one say so and leave;
what lost its launcher has nothing to say, but on a busy machine waits for its turn to end"""
RUN_SECONDS = 300.0
"""for a run that nothing kills to end"""


class KilledRun(ABC):
    """One run of the tiny world and its processes."""

    way: str

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.mark = world.folder / "runs" / str(number)
        self.mark.mkdir(parents=True, exist_ok=True)
        self.log = self.mark / "log"

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The run folder, which may not be there yet."""

    @abstractmethod
    def start(self) -> None:
        """Start the run, or continue it after a kill."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether nothing goes on, and nothing is to follow."""

    @abstractmethod
    def kill(self, rng: random.Random) -> str:
        """Kill a victim drawn from those there are; what it was, empty where there is none yet."""

    @abstractmethod
    def outcome(self) -> str:
        """Why a run that has ended did not succeed; empty where it did."""

    def sweep(self) -> None:
        """End whatever still goes on."""
        while left := processes(self.mark):
            end_all(left)
            time.sleep(0.1)

    @abstractmethod
    def settle(self) -> list[str]:
        """Wait until a kill has had its effect; the processes that outlive it although they must
        not."""

    def orphans(self, seconds: float) -> list[str]:
        """The processes that are left after so many seconds."""
        wait(lambda: not processes(self.mark), seconds)
        return [process.name for process in processes(self.mark)]

    def last_words(self) -> str:
        """The last line of sd-perf in the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("sd-perf: ")]
        return (ours or lines or [""])[-1][:300]


class LocalRun(KilledRun):
    """Two processes on this machine, by run_and_time.sh or by a plain torchrun and `evaluate` after
    it; a kill of a rank or of a launcher."""

    def __init__(self, world: World, number: int, way: str, *, plain: bool = False) -> None:
        super().__init__(world, number)
        self.way, self._plain = way, plain
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.mark / "run"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self.world.environment(self.mark),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for this process
            )

    def _command(self) -> list[str]:
        preset, folder = str(self.world.preset), str(self.folder)
        if not self._plain:
            script = [str(REPOSITORY / "run_and_time.sh"), "--config", preset, "--run-dir", folder]
            script += ["--results-dir", str(self.mark), "--gpus-per-node", str(PROCESSES)]
            return [*script, "--no-clear-caches"]
        python = [sys.executable, "-m"]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        train = ["-m", "sd_perf", "train", "--config", preset, "--run.dir", folder, "--resume"]
        evaluate = shlex.join([*python, "sd_perf", "evaluate", folder])
        return ["sh", "-c", f"{shlex.join([*python, *torchrun, *train])} && {evaluate}"]

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def kill(self, rng: random.Random) -> str:
        found = [one for one in processes(self.mark) if self._is_victim(one)]
        if not found or self.ended():
            return ""
        victim = rng.choice(sorted(found, key=lambda one: one.number))
        end_all([victim])
        return victim.name

    def _is_victim(self, process: Process) -> bool:
        if self.way == RANK:
            return process.is_rank()
        torchruns = (("sd_perf.cluster.torchrun",), ("torch.distributed.run",))
        return process.words[3:5] == ("cluster", "run") or process.words[2:3] in torchruns

    def settle(self) -> list[str]:
        return self.orphans(GONE_SECONDS[self.way])

    def outcome(self) -> str:
        code = self._process.poll() if self._process else None
        return f"ended with exit code {code}: {self.last_words()}" if code else ""


class SlurmRun(KilledRun):
    """slurm/sbatch.sh of two processes, on one node or on two; a kill of a node."""

    way = NODE

    def __init__(self, world: World, number: int, cluster: VirtualCluster, nodes: int) -> None:
        super().__init__(world, number)
        self._cluster, self._nodes = cluster, nodes
        self._jobs: list[str] = []
        """training and, after it, evaluation"""
        self._killed = ("", "", "")
        """job, node and, to tell the start, state of the last kill"""

    @property
    def folder(self) -> Path:
        manifests = self.mark.glob("*_soak/run_manifest.json")
        return next((path.parent for path in manifests), self.mark / "none_yet")

    def start(self) -> None:
        if self._jobs:  # Slurm itself continues the run
            self._cluster.start_node(self._killed[1])
            return
        words = ["--config", self.world.preset, "--results-dir", self.mark]
        words += ["--log-dir", self.mark / "logs", "--walltime", "00:20:00"]
        words += ["--num-nodes", self._nodes, "--gpus-per-node", PROCESSES // self._nodes]
        variables = [f"{k}={v}" for k, v in self._variables().items()]
        output = self._cluster.call("env", *variables, REPOSITORY / "slurm/sbatch.sh", *words)
        self._jobs = re.findall(r"submitted job (\d+)", output)

    def _variables(self) -> dict[str, str]:
        """Those of the world that the cluster's own environment has not."""
        ours, theirs = self.world.environment(self.mark), self._cluster.environment
        return {key: value for key, value in ours.items() if theirs.get(key) != value}

    def _state(self, job: str) -> str:
        return self._cluster.field(job, "JobState")

    def ended(self) -> bool:
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        states = [self._state(job) for job in self._jobs]
        return states[-1] in done or (states[0] in done and states[0] != "COMPLETED")

    def kill(self, rng: random.Random) -> str:
        job = next((job for job in self._jobs if self._state(job) == "RUNNING"), None)
        if job is None:
            return ""
        hosts = self._cluster.field(job, "NodeList")
        names = self._cluster.call("scontrol", "show", "hostnames", hosts).split()
        node = rng.choice(names)
        self._killed = (job, node, self._starts(job))
        self._cluster.kill_node(node)
        kind = "training" if job == self._jobs[0] else "evaluation"
        return f"{node}, one of {len(names)}, in {kind}"

    def settle(self) -> list[str]:
        job, _, starts = self._killed
        noticed = wait(lambda: self._starts(job) != starts, GONE_SECONDS[NODE], poll=0.5)
        return [] if noticed else [f"job {job}: Slurm did not notice"]

    def _starts(self, job: str) -> str:
        """Tells the starts of a job apart."""
        state = self._state(job)
        return f"{state if state != 'RUNNING' else ''} {self._cluster.field(job, 'Restarts')}"

    def outcome(self) -> str:
        states = [self._state(job) for job in self._jobs]
        if states == ["COMPLETED"] * len(states):
            return ""
        return f"jobs ended as {', '.join(states)}: {self.last_words()}"

    def last_words(self) -> str:
        logs = sorted((self.mark / "logs").glob("*"), key=os.path.getmtime)
        self.log = logs[-1] if logs else self.log
        return super().last_words()

    def sweep(self) -> None:
        for job in self._jobs:
            self._cluster.call("scancel", "--quiet", job)
        super().sweep()
        nodes_are_back = lambda: self._cluster.states() == {"idle"}  # noqa: E731
        self._cluster.wait(nodes_are_back, "both nodes are idle", 60)
