"""Timed training runs: rates from intervals, configs from options, and the stopwatch's stop."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import training_run
from benchmarks.pairs import in_turns, pair_row
from benchmarks.training_run import changed, config_of, settled, timed_run
from sd_perf.config import Config, TrainingConfig, UNetConfig
from sd_perf.distributed.world import World

CPU = World(rank=0, size=1, device=torch.device("cpu"))


def options(**changes: Any) -> argparse.Namespace:
    given = {"config": None, "source": "synthetic", "shards": None, "batch": None, "set": []}
    return argparse.Namespace(**{**given, "tiny": False, **changes})


def test_the_rate_is_that_of_the_second_half_stalls_included() -> None:
    found = settled([10.0] * 10 + [20.0] * 8 + [120.0] * 2, batch=4)
    assert found["samples_per_second"] == pytest.approx(1000 * 4 * 10 / 400)
    assert found["samples_per_second_first_tenth"] == pytest.approx(400)
    assert found["ms_per_iteration"] == 20


def test_the_curve_has_few_points_and_all_samples() -> None:
    curve = settled([10.0] * 1000, batch=2)["curve"]
    assert len(curve["samples"]) == len(curve["samples_per_second"]) <= training_run.MOST_WINDOWS
    assert curve["samples"][-1] == 2000 and set(curve["samples_per_second"]) == {200.0}


def test_defaults_are_the_benchmarks() -> None:
    config = config_of(options(), ranks=4)
    assert config.model.network == UNetConfig() and config.model.implementation == "fast"
    assert config.training.global_batch_size == 4 * 64 and config.training.seed == 0


def test_options_change_the_preset() -> None:
    texts = ["training.precision=fp32", "training.accumulate_steps=2", "data.latent_size=32"]
    texts += [
        "training.cuda_graph=off",
        "model.channel_mult=[1, 2]",
        "model.attention_resolutions=[2]",
    ]
    config = config_of(options(set=texts, batch=3), ranks=2)
    assert config.training.precision == "fp32" and config.data.latent_size == 32
    assert config.training.cuda_graph == "off" and config.model.channel_mult == (1, 2)
    assert config.training.global_batch_size == 3 * 2 * 2
    assert training_run.conditions(config, 2)["batch"] == 3


def test_changes_leave_the_preset_alone() -> None:
    tree = {"training": {"seed": 1}}
    assert changed(tree, {"training.seed": 2, "model.compile": True}) == {
        "training": {"seed": 2},
        "model": {"compile": True},
    }
    assert tree == {"training": {"seed": 1}}


def test_sources_are_the_formats_of_the_config() -> None:
    assert set(training_run.SOURCES) >= {"moments", "synthetic"}


def test_mfu_is_of_the_benchmarks_network_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, full = torch.device("cuda"), Config()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert training_run.mfu(full, 145.0, gpu) == pytest.approx(0.353, abs=0.001)
    assert training_run.mfu(full, 145.0, torch.device("cpu")) is None
    tiny = config_of(options(tiny=True), 1)
    assert training_run.mfu(tiny, 145.0, gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert training_run.mfu(full, 145.0, gpu) is None


def test_a_run_trains_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["training.deterministic=true"]
    row = timed_run(config_of(options(tiny=True, set=texts), 1), CPU, warm_up_steps=2, seconds=0.01)
    assert row["timed_iterations"] == training_run.LEAST_STEPS
    assert row["prepare_s"] > 0 and row["warm_up_s"] > 0 and row["timed_s"] > 0
    assert not list(tmp_path.iterdir())


def test_as_many_steps_are_timed_as_fit_into_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the second half of the warm-up: its two steps take 0.5 s of this clock."""
    moments = itertools.count(0.0, 0.5)
    clock = SimpleNamespace(perf_counter=lambda: next(moments))
    monkeypatch.setattr(training_run, "time", clock)
    row = timed_run(config_of(options(tiny=True), 1), CPU, warm_up_steps=4, seconds=5)
    assert row["timed_iterations"] == 20 > training_run.LEAST_STEPS


def test_sides_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    seconds = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, turns=3)
    assert "".join(calls) in ("abbaabba", "baabbaab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_the_same_turn() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 3.0, 4.0]}
    conditions = {"batch": 1, "dtype": "float32", "cached": "nothing"}
    row = pair_row("w", seconds, "ours", "theirs", conditions, threads=1)  # type: ignore[arg-type]
    assert row["clock"] == "wall"
    assert (row["ratio"], row["ratio_low"], row["ratio_high"], row["turns"]) == (1.5, 1.0, 2.0, 3)
    assert (row["side_s"], row["rival_s"]) == (2.0, 3.0)


def test_strategies_are_those_of_the_config() -> None:
    from benchmarks.scaling import STRATEGIES

    assert TrainingConfig(strategy=STRATEGIES[-1]).strategy == STRATEGIES[-1]
