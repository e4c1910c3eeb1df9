"""The moving average of the weights: diffusers' formula, every step, exact on resume, `--ema`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from sd_kernels.adamw.reference import split_master
from sd_kernels.average import average_weights
from sd_kernels.average_triton import average_weights as average_by_kernel
from sd_kernels.errors import KernelError
from sd_perf.config import Config
from sd_perf.errors import CheckpointError
from sd_perf.evaluation.draw import draw_prompts
from sd_perf.models.readers import read_unet
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.runs.checkpoints import CheckpointStore, load_component, load_weights
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.ema import PlainEma, decay_of_step
from tests.small_run import small_config, small_trainer

DECAY = 0.9
STEPS = 6
KINDS = {
    "plain": {},
    "fast": {"model": {"implementation": "fast"}},
    "fast bf16": {"model": {"implementation": "fast"}, "training": {"precision": "bf16"}},
}


def diffusers_ema(network: torch.nn.Module, decay: float):
    define_missing_torchvision_ops()
    training_utils = pytest.importorskip("diffusers.training_utils")
    return training_utils.EMAModel(network.parameters(), decay=decay, use_ema_warmup=True)


def test_decay_warms_up():
    decays = [decay_of_step(0.9999, step) for step in (0, 7, 26, 10**7)]
    assert decays == pytest.approx([0, 0.75, 8 / 9, 0.9999])


@pytest.mark.slow
def test_decay_is_diffusers():
    theirs = diffusers_ema(torch.nn.Linear(1, 1), 0.9999)
    steps = [0, 1, 2, 10, 999, 31_622, 999_999, 10**7]
    ours = [decay_of_step(0.9999, step) for step in steps]
    assert ours == pytest.approx([theirs.get_decay(step + 1) for step in steps], rel=1e-12)
    assert ours[0] == 0 and ours[-1] == 0.9999


@pytest.mark.slow
def test_average_is_diffusers():
    network = torch.nn.Linear(5, 7)
    theirs, ours = diffusers_ema(network, DECAY), PlainEma(network, DECAY)
    for step in range(8):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight))
        theirs.step(network.parameters())
        ours.update(step)
    pairs = zip(ours.tensors().values(), theirs.shadow_params, strict=True)
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs)


@pytest.mark.parametrize("is_split", [False, True])
def test_kernel_is_torch_bit_for_bit(is_split, device):
    generator = torch.Generator().manual_seed(0)
    average, masters = torch.randn(2, 1024 + 77, generator=generator).to(device).unbind()
    weights, remainders = split_master(masters) if is_split else (masters, None)
    rate = torch.tensor(0.3, device=device)
    # In float32 with one rounding an operation; the joined masters are those that were split.
    right = average + (masters - average) * rate
    for function in (average_weights, average_by_kernel):
        given = average.clone()
        function(given, weights, remainders, rate)
        assert torch.equal(given, right)


def test_kernel_refuses_bfloat16_alone():
    average = torch.zeros(4)
    with pytest.raises(KernelError, match="without remainders"):
        average_weights(average, average.bfloat16(), None, torch.ones(()))


def config_of(kind: str, folder: Path) -> Config:
    """A run of a kind with an average, and a checkpoint after each of its steps."""
    changes = KINDS[kind]
    training = {**changes.get("training", {}), "max_samples": 4 * STEPS, "ema_decay": DECAY}
    return small_config(
        folder, **{**changes, "training": training, "checkpoint": {"every_samples": 4}}
    )


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[[str], Path]:
    """run_of(kind): the run, trained once."""

    @cache
    def train(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("ema") / "run"
        small_trainer(config_of(kind, folder), [Checkpointer()]).fit()
        return folder

    return train


OFTEN = "fast bf16"
SELDOM = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != OFTEN]


@pytest.mark.parametrize("kind", [OFTEN, *SELDOM])
def test_checkpoints_hold_the_average_of_the_weights(kind, run_of):
    average: dict[str, torch.Tensor] = {}
    for step, path in enumerate(CheckpointStore(run_of(kind) / "checkpoints").complete()):
        weights, kept = load_component(path, "model"), load_component(path, "ema")
        rate = 1 - decay_of_step(DECAY, step)
        average = {
            name: weight if step == 0 else average[name] + (weight - average[name]) * rate
            for name, weight in weights.items()
        }
        assert kept.keys() == weights.keys()
        assert all(value.dtype == torch.float32 for value in kept.values())
        for name in kept:
            torch.testing.assert_close(kept[name], average[name], rtol=1e-6, atol=1e-8)
    assert step == STEPS - 1
    assert any(not torch.equal(kept[name], weights[name]) for name in kept)


@pytest.mark.parametrize("kind", [OFTEN, *SELDOM])
def test_resumed_average_is_bit_identical(kind, run_of, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_of(kind), folder)
    store = CheckpointStore(folder / "checkpoints")
    whole = load_component(store.complete()[-1], "ema")
    for path in store.complete()[-3:]:
        shutil.rmtree(path)
    trainer = small_trainer(config_of(kind, folder), [Checkpointer()], resume=True)
    assert trainer.steps == STEPS - 3
    trainer.fit()
    again = load_component(store.complete()[-1], "ema")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_reads_weights_takes_the_average(run_of):
    newest = CheckpointStore(run_of(OFTEN) / "checkpoints").complete()[-1]
    average = load_component(newest, "ema")
    read, _ = read_unet(run_of(OFTEN), ema=True)
    assert all(torch.equal(read[name], average[name]) for name in average)


def test_a_run_without_average_says_so(make_config, make_trainer, tmp_path):
    trainer = make_trainer(make_config("run", training={"max_samples": 4}), [Checkpointer()])
    trainer.fit()
    newest = trainer.store.newest()
    for read in (
        lambda: load_weights(newest, ema=True),
        lambda: read_unet(trainer.folder, ema=True),
    ):
        with pytest.raises(CheckpointError, match=r"samples_\d+: holds no averaged weights.*--ema"):
            read()
    with pytest.raises(CheckpointError):
        draw_prompts(trainer.folder, ["a cat"], Path("none"), tmp_path / "out", ema=True)
