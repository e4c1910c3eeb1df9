"""Several ranks of the fast network: whatever they share, they train as one process does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_kernels.fp8_linear.scaling import INPUT, SLOTS, WEIGHT
from sd_perf.distributed.strategies import AllReduce, ShardedOptimizer, Strategy, build_strategy
from sd_perf.distributed.world import World
from sd_perf.errors import ConfigError
from sd_perf.fast.linear import precision_state
from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.training.build_step import build_step
from sd_perf.training.callbacks.checkpointer import Checkpointer
from tests.small_run import small_config, small_trainer
from tests.training.test_resume import StopAt, final_tensors, relative_error
from tests.waiting import PATIENCE, wait_for

STEPS, BATCH = 50, 16
# Programs leave by os._exit, see tests/distributed/test_world.py.
PROGRAM = """
import json, os, sys
from pathlib import Path
from sd_kernels.spec import Target
from sd_perf.distributed.world import start_world, stop_world
from sd_perf.fast.choice import choose_kernels
from sd_perf.runs.folder import open_run
from sd_perf.training.build_step import build_step
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.launch import build_trainer
from tests.small_run import small_config

world = start_world("cpu")
for folder, changes in json.loads(sys.argv[1]):
    config = small_config(Path(folder), **changes)
    # Asked by one rank, before it makes the folder: the others may come here later.
    resume = world.on_main(Path(folder).is_dir)
    settled = world.on_main(lambda: open_run(config, resume=resume))
    choices = choose_kernels(config, Target.here())
    trainer = build_trainer(settled, world, choices, [Checkpointer()])
    if resume:
        trainer.load(trainer.store.newest())
    trainer.fit()
stop_world()
os._exit(0)
"""


def changes(strategy: str, accumulate: int = 1, steps: int = STEPS) -> dict[str, Any]:
    training = {
        "global_batch_size": BATCH,
        "max_samples": steps * BATCH,
        "strategy": strategy,
        "accumulate_steps": accumulate,
        "ema_decay": 0.9,
    }
    return {
        "model": {"implementation": "fast"},
        "training": training,
        "optimizer": {"base_learning_rate": 2.5e-5},  # 4e-4 in all, as small_run has it for 4
        "checkpoint": {"every_samples": steps * BATCH // 2},
    }


def run_ranks(count: int, runs: list[tuple[Path, dict[str, Any]]]) -> None:
    """Train one run after the other in `count` processes; a folder that exists is resumed."""
    processes = start_ranks(count, runs)
    outputs = [process.communicate(timeout=2 * PATIENCE)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)


def start_ranks(
    count: int, runs: list[tuple[Path, dict[str, Any]]], program: str = PROGRAM
) -> list[subprocess.Popen[str]]:
    """`run_ranks`, not waited for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = json.dumps([(str(folder), changed) for folder, changed in runs])
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, given],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in map(str, range(count))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[int], Path]:
    """alone(steps): the run in one process, without accumulation; each trained once."""

    @cache
    def train(steps: int) -> Path:
        config = small_config(
            tmp_path_factory.mktemp("alone") / "run", **changes("auto", steps=steps)
        )
        trainer = small_trainer(config, [Checkpointer()])
        trainer.fit()
        return trainer.folder

    return train


def half_of(run: Path, folder: Path) -> Path:
    """A copy of a run, as if it had been stopped at half its length."""
    shutil.copytree(run, folder)
    CheckpointStore(folder / "checkpoints").complete()[-1].rename(folder / "last")
    return folder


@pytest.mark.parametrize(
    ("count", "strategies", "accumulations", "steps"),
    [
        (2, ["zero1"], [1], 12),
        pytest.param(2, ["ddp", "zero1"], [1, 4], STEPS, marks=pytest.mark.slow),
        pytest.param(4, ["ddp", "zero1"], [1, 4], STEPS, marks=pytest.mark.slow),
    ],
)
def test_ranks_equal_one_process_and_resume_each_other(
    count, strategies, accumulations, steps, alone, tmp_path
):
    runs = {
        f"{strategy}-{accumulate}": (tmp_path / f"{strategy}-{accumulate}", strategy, accumulate)
        for strategy in strategies
        for accumulate in accumulations
    }
    begun = [(folder, changes(*of, steps)) for folder, *of in runs.values()]
    resumed = half_of(alone(steps), tmp_path / "resumed")  # begun in one process
    run_ranks(count, [*begun, (resumed, changes("zero1", steps=steps))])
    # And back: begun by ranks that each held a part of the state, ended by one process.
    half = half_of(tmp_path / "zero1-1", tmp_path / "back")
    back = small_config(half, **changes("auto", steps=steps))
    trainer = small_trainer(back, [Checkpointer()], resume=True)
    assert trainer.steps == steps // 2
    trainer.fit()
    right = final_tensors(alone(steps))
    for folder in (*(folder for folder, *_ in runs.values()), resumed, trainer.folder):
        error = relative_error(final_tensors(folder), right)
        print(f"{count} ranks, {folder.name}: largest relative error {error:.1e}")
        assert 0 < error < 1e-5, folder.name
    newest = CheckpointStore(tmp_path / "zero1-1" / "checkpoints").newest()
    assert newest is not None
    files = [file for file in read_state(newest)["files"] if file.startswith("exp_avg_sq")]
    assert len(files) == count


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "ddp"])
def test_ranks_that_compute_blocks_again(strategy, alone, tmp_path):
    changed = changes(strategy, steps=12)
    changed["model"] |= {"activation_checkpointing": True}
    run_ranks(2, [(tmp_path / "run", changed)])
    error = relative_error(final_tensors(tmp_path / "run"), final_tensors(alone(12)))
    print(f"{strategy}: largest relative error {error:.1e}")
    assert 0 < error < 1e-5


ONE_DISK_FULL = """
import os
from sd_perf.runs import checkpoints
write_shard, calls = checkpoints.write_shard, []
def full(*arguments):
    calls.append(arguments)
    if os.environ["RANK"] == "1" and len(calls) > 1:
        raise OSError(28, "No space left on device")
    return write_shard(*arguments)
checkpoints.write_shard = full
"""


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_all(tmp_path):
    """The checkpoint before stays the newest, and nothing looks like one that is not whole."""
    often = {**changes("zero1", steps=12), "checkpoint": {"every_samples": 4 * BATCH}}
    processes = start_ranks(2, [(tmp_path / "run", often)], ONE_DISK_FULL + PROGRAM)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert all(process.returncode for process in processes), outputs
    assert "rank 1 could not write its part" in "".join(outputs)
    assert saved(tmp_path / "run") == 4 * BATCH
    final_tensors(tmp_path / "run")  # every tensor loads


@pytest.mark.slow
def test_ranks_killed_while_they_write_together(tmp_path):
    """The newest checkpoint loads, and the run that continues is the run never killed."""

    def often(steps: int) -> dict[str, Any]:
        return {**changes("zero1", steps=steps), "checkpoint": {"every_samples": BATCH}}

    run, position = tmp_path / "run", 0
    for kill in range(4):
        processes = start_ranks(2, [(run, often(100_000))])  # none ends before it is killed
        wait_for(partial(is_writing_after, run, position))
        for process in processes:
            process.kill()
            process.communicate()
        print(f"kill {kill}: newest at {saved(run)}")
        final_tensors(run)  # every tensor loads
        assert saved(run) > position
        position = saved(run)
    end = often(position // BATCH + 5)
    run_ranks(2, [(run, end), (tmp_path / "whole", end)])
    killed, whole = final_tensors(run), final_tensors(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert not any(run.glob("checkpoints/.writing_*"))


def is_writing_after(run: Path, position: int) -> bool:
    """Whether ranks write a checkpoint, and have completed one after a position."""
    return saved(run) > position and any(run.glob("checkpoints/.writing_*.parts"))


def saved(run: Path) -> int:
    """Position of the newest checkpoint, 0 where there is none."""
    newest = CheckpointStore(run / "checkpoints").newest()
    return int(newest.name.removeprefix("samples_")) if newest else 0


def test_names_of_strategies():
    one, two = (World(rank=0, size=size, device=torch.device("cpu")) for size in (1, 2))
    assert type(build_strategy("zero1", one)) is Strategy
    assert type(build_strategy("ddp", two)) is AllReduce
    assert type(build_strategy("auto", two)) is ShardedOptimizer
    assert build_strategy("zero1", two).share == (0, 2) and build_strategy("ddp", two).share == (
        0,
        1,
    )


DELAYED = {"feed_forward": "fp8_native", "fp8_recipe": "delayed"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "ddp"])
def test_ranks_have_the_fp8_scales_of_one_process(strategy, make_config, make_trainer, tmp_path):
    """Amax is that of all ranks' samples: the largest, not the first rank's."""
    short = changes(strategy)
    short["training"] |= {"precision": "bf16", "max_samples": 3 * BATCH}
    short["precision"] = DELAYED
    alone = make_trainer(make_config("alone", **short), [Checkpointer()])
    alone.fit()
    run_ranks(2, [(tmp_path / "ranks", short)])
    newest = CheckpointStore(tmp_path / "ranks" / "checkpoints").newest()
    ours, theirs = (
        load_component(path, "precision_state")["delayed_scaling.history"]
        for path in (newest, alone.store.newest())
    )
    # Of forward passes: gradients of transformers, whose last layer is zero, are zero at first.
    assert ours[:3, INPUT::SLOTS].all() and not ours[3:].any()
    assert torch.allclose(ours[:, INPUT::SLOTS], theirs[:, INPUT::SLOTS], rtol=0.01)
    assert torch.allclose(ours[:, WEIGHT::SLOTS], theirs[:, WEIGHT::SLOTS], rtol=0.01)


def test_zero1_is_refused_where_torch_compiles(make_config, make_trainer):
    ranks = World(rank=0, size=2, device=torch.device("cpu"))
    config = make_config(
        model={"implementation": "fast", "compile": True}, training={"strategy": "zero1"}
    )
    unet = make_trainer(make_config("other", model={"implementation": "fast"})).unet
    with pytest.raises(
        ConfigError, match=r"training\.strategy: 'zero1' .* ddp with model\.compile"
    ):
        build_step(unet, config, seed=0, world=ranks, text_encoder=None, ops=unet.ops)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_what_is_done_once_changes_nothing(precision, make_config, make_trainer):
    """A rehearsed run is, bit for bit, the run that was not; so a resumed run may be, too."""
    is_fp8 = precision == "fp8"
    training = {"precision": "bf16" if is_fp8 else precision}
    training |= {"max_samples": 24, "accumulate_steps": 2}
    options = {"model": {"implementation": "fast"}, "precision": DELAYED if is_fp8 else {}}
    finals = []
    for name in ("plain", "rehearsed"):
        config = make_config(name, **options, training=training)
        trainer = make_trainer(config, [StopAt(3), Checkpointer()])
        if name == "rehearsed":
            trainer.step.rehearse()
        trainer.fit()
        resumed = make_trainer(config, [Checkpointer()], resume=True)
        if name == "rehearsed":
            resumed.step.rehearse()
        resumed.fit()
        finals.append(final_tensors(resumed.folder) | precision_state(resumed.unet))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
