"""Pictures while training: of the right weights, in every sink, and without a trace in training."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_perf.config import Config
from sd_perf.console import TextConsole
from sd_perf.distributed.world import start_world
from sd_perf.errors import CheckpointError, ConfigError, DataError
from sd_perf.evaluation.evaluate import _shows_own_prompts
from sd_perf.evaluation.fixed_prompts import FixedPrompts
from sd_perf.runs.checkpoints import load_component
from sd_perf.training.launch import launch

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "a dog", "a red circle"]


@pytest.fixture
def config(make_config) -> Callable[..., Config]:
    """config(name, **sampling): 16 samples by the fast network, a checkpoint every 8."""

    def make(name: str, *, max_samples: int = 16, autoencoder: str = "", **sampling) -> Config:
        tiny = str(ROOT / "assets/tiny/autoencoder.safetensors")
        return make_config(
            name,
            model={"context_dim": 128, "implementation": "fast"},
            training={"max_samples": max_samples, "cpu_threads": 1},
            checkpoint={"every_samples": 8},
            logging={"every_steps": 1, "sinks": ["csv"]},
            text_encoder={"model": str(ROOT / "configs/text_tiny.json"), "weights": "random"},
            evaluation={"autoencoder": autoencoder or tiny},
            sampling={"steps": 2, "guidance_scale": 2.0, **sampling},
        )

    return make


def train(config: Config, *, resume: bool = False) -> Path:
    console = TextConsole(quiet=True)
    launch(config, start_world("cpu"), resume=resume, fresh=False, console=console)
    return Path(config.run.dir)


def state(run: Path, samples: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"samples_{samples:010d}"
    parts = ("model", "exp_avg", "exp_avg_sq")
    return {f"{p}.{name}": t for p in parts for name, t in load_component(folder, p).items()}


def test_training_is_the_same_to_the_last_bit(config) -> None:
    without = train(config("without"))
    stream = torch.get_rng_state()
    drawn = train(config("with", every_samples=4, prompts=PROMPTS))
    assert torch.equal(torch.get_rng_state(), stream)
    states = state(without, 16), state(drawn, 16)
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (without, drawn)
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]

    grids = sorted((drawn / "samples").glob("*.png"))
    assert [path.stem[-2:] for path in grids] == ["00", "04", "08", "12", "16"]
    assert json.loads(grids[0].with_suffix(".json").read_text()) == {
        "prompts": PROMPTS,
        "columns": 3,
    }
    pictures = [np.asarray(Image.open(path)) for path in grids]
    assert all(picture.shape == (64, 192, 3) for picture in pictures)
    assert all((one != next).any() for one, next in itertools.pairwise(pictures))
    with (drawn / "pictures.csv").open() as file:
        sent = list(csv.DictReader(file))
    assert [int(row["samples"]) for row in sent] == [0, 4, 8, 12, 16]
    assert not (without / "samples").exists()

    # The same as those of the checkpoint's weights.
    elsewhere = config("again", every_samples=4, prompts=PROMPTS)
    again = FixedPrompts(elsewhere, torch.device("cpu"))
    path = again.draw(load_component(drawn / "checkpoints/samples_0000000008", "model"), 0, 8)
    assert path.read_bytes() == grids[2].read_bytes()


@pytest.mark.slow
def test_a_resumed_run_draws_on(config) -> None:
    run = train(config("run", max_samples=8, every_samples=8, prompts=PROMPTS))
    times = {path: path.stat().st_mtime_ns for path in (run / "samples").iterdir()}
    train(config("run", every_samples=8, prompts=PROMPTS), resume=True)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    stems = sorted(path.stem[-2:] for path in (run / "samples").glob("*.png"))
    assert stems == ["00", "08", "16"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"autoencoder": "no.safetensors"}, CheckpointError, "no.safetensors"),
        ({"prompts": []}, ConfigError, "evaluation.prompts: '' cannot be used; it must be a file"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_is_written(
    config, changes, error, words
) -> None:
    wrong = config("run", **{"every_samples": 4, "prompts": PROMPTS, **changes})
    with pytest.raises(error, match=words):
        train(wrong)
    assert not Path(wrong.run.dir).exists()


@pytest.mark.slow
def test_pictures_that_are_not_finite_do_not_end_the_run(config, monkeypatch, capsys) -> None:
    def draw(*_) -> Path:
        raise CheckpointError("the weights: 3 of 3 latents that it gives are NaN or infinite")

    monkeypatch.setattr(FixedPrompts, "draw", draw)
    wanted = config("run", max_samples=8, every_samples=8, prompts=PROMPTS)
    launch(wanted, start_world("cpu"), resume=False, fresh=False, console=TextConsole(width=200))
    assert capsys.readouterr().out.count("no pictures at") == 2


@pytest.mark.slow
def test_prompts_of_the_evaluation(config, tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(f'{{"caption": "picture {i}"}}\n' for i in range(20)))
    wanted = config("run", every_samples=4)
    options = dataclasses.replace(wanted.evaluation, prompts=str(captions), num_prompts=20)
    wanted = dataclasses.replace(wanted, evaluation=options)
    pictures = FixedPrompts(wanted, torch.device("cpu"))
    assert pictures.prompts == [f"picture {i}" for i in range(8)]
    folder = tmp_path / "run" / "samples"
    pictures.draw(dict(pictures._unet.named_parameters()), 0, 4)
    assert not _shows_own_prompts(folder, 4, [f"picture {i}" for i in range(20)])
    assert _shows_own_prompts(folder, 4, [f"another {i}" for i in range(20)])
    captions.write_text('{"caption": "alone"}\n')
    with pytest.raises(DataError, match="holds 1 captions"):
        FixedPrompts(wanted, torch.device("cpu"))


@pytest.mark.slow
def test_more_prompts_than_a_row(config, tmp_path: Path) -> None:
    wanted = config("run", every_samples=4, prompts=[f"picture {i}" for i in range(11)])
    pictures = FixedPrompts(wanted, torch.device("cpu"))
    path = pictures.draw(dict(pictures._unet.named_parameters()), 0, 4)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (2 * 64, 8 * 64, 3) and (grid[64:, 3 * 64 :] == 255).all()
    assert len(json.loads(path.with_suffix(".json").read_text())["prompts"]) == 11
