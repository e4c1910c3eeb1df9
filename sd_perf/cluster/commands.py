"""The commands that a run of the benchmark's scripts consists of, and running one of them."""

from __future__ import annotations

import os
import pwd
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

from sd_perf.children import end_with_parent
from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.stopping import STOP_SIGNALS
from sd_perf.visible import visible

_KILLED = 128
"""exit code of a command that a signal ended, less the signal's number, as shells have it"""


@dataclass(frozen=True)
class Training:
    """What one training run is told, whoever starts its processes."""

    config: Path
    folder: Path
    """the run folder"""
    checkpoint: str = ""
    """file of the frozen networks; empty: those that the config names"""
    seed: int | None = None
    """None: the config's"""
    needs_proof: bool = False
    """whether the run starts with a green parity record alone, which lies beside the run folders"""

    def proof(self) -> list[str]:
        """The command that makes the record, unless it stands; empty where none is needed."""
        words = ["cluster", "prove", "--config", str(self.config), "--run.dir", str(self._proven())]
        return words if self.needs_proof else []

    def _proven(self) -> Path:
        """The record is of the config and serves all its runs: it lies in this + ".parity"."""
        return self.folder.parent / self.config.stem

    def command(self, *, caches_cleared: bool) -> list[str]:
        """`train` and its options. It continues the run in the folder, where there is one."""
        words = ["train", "--config", str(self.config), "--run.dir", str(self.folder), "--resume"]
        if self.checkpoint:
            words += ["--text-encoder.weights", self.checkpoint]
            words += ["--evaluation.autoencoder", self.checkpoint]
        if self.seed is not None:
            words += ["--training.seed", str(self.seed)]
        if self.needs_proof:
            words += ["--mlperf.parity-record", f"{self._proven()}.parity/parity.json"]
        return [*words, "--mlperf.caches-cleared"] if caches_cleared else words


def is_evaluated(config: Config) -> bool:
    """Whether the config names what its checkpoints are scored with."""
    return bool(config.evaluation.prompts)


def needs_proof(config: Config) -> bool:
    """Whether a run of the config starts only with a parity record, and it names none."""
    mlperf = config.mlperf
    named = mlperf.parity_record or "parity" in mlperf.waive
    return mlperf.division != "none" and config.model.implementation == "fast" and not named


def run_name(config: Path, now: datetime) -> str:
    """The name of a new run's folder, such as 2024-05-01T12-00-00_train_512_moments."""
    return f"{now:%Y-%m-%dT%H-%M-%S}_{config.stem}"


def require_counts(num_nodes: int, gpus_per_node: int) -> None:
    """UserError for numbers of machines and processes that nobody has."""
    for option, value, most in (
        ("--num-nodes", num_nodes, 100_000),
        ("--gpus-per-node", gpus_per_node, 1000),
    ):
        require_between(option, value, 1, most)


def require_between(option: str, value: int, least: int, most: int) -> None:
    """UserError for a number outside of two limits, both included."""
    if not least <= value <= most:
        raise UserError(f"{option}: {value} cannot be used; it must be from {least:,} to {most:,}")


def require_results_dir(folder: Path, *, shown: Path | None = None) -> None:
    """UserError where no run folder can be made below this folder of results."""
    shown = shown or folder
    if (folder / "run_manifest.json").exists():
        raise UserError(
            f"{shown}: is the folder of a run; give a folder below which each run gets its own"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{shown}: is not a folder; results need one")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{shown}: {existing} cannot be written; choose another --results-dir")


def user_name() -> str:
    """The login name of this process's user, or its number where the system knows no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def in_shell(command: Sequence[str]) -> str:
    """A command as one line for a shell."""
    return visible(shlex.join(command))


def say(words: str) -> None:
    """Print a line at once: the output of the commands that are run comes between."""
    print(visible(words), flush=True)


def run(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    listen: Callable[[str], None] | None = None,
) -> int:
    """Run a command to its end; returns its exit code, 128 + number where a signal ended it.

    Signals that ask this process to stop are handed on to the command and otherwise ignored: it
    answers them in its own way, and its exit code tells. It ends with this process, even by
    kill -9. `listen` gets each line of its stderr, too.
    """
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if started:
            started[0].send_signal(number)
        else:
            early.append(number)

    ignored = [n for n in STOP_SIGNALS if signal.getsignal(n) is signal.SIG_IGN]
    previous = {n: signal.signal(n, hand_on) for n in STOP_SIGNALS if n not in ignored}
    try:
        pipe = subprocess.PIPE if listen else None
        ends_too = partial(end_with_parent, os.getpid())  # safe: this process has no threads
        words = list(command)
        started.append(subprocess.Popen(words, env=environment, stderr=pipe, preexec_fn=ends_too))
        for number in early:
            started[0].send_signal(number)
        for line in started[0].stderr or ():
            os.write(2, line)
            if listen:
                listen(line.decode(errors="replace"))
        code = started[0].wait()
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else _KILLED - code


def python_module(module: str, *arguments: str) -> list[str]:
    """A module, run by this Python."""
    return [sys.executable, "-m", module, *arguments]
