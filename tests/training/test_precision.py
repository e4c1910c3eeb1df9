"""Training with linear layers in FP8 and with a compiled UNet: what is saved, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sd_kernels.targets import GPUS, Target
from sd_perf.config import KernelsConfig
from sd_perf.distributed.world import start_world
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.fast.linear import precision_state
from sd_perf.runs.checkpoints import load_component
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.metrics import MetricsFile
from sd_perf.training.launch import launch
from tests.kernels import fake_te
from tests.runs.test_checkpoints import reseal
from tests.training.test_resume import StopAt, assert_bit_identical, final_tensors

FAST = {"implementation": "fast"}
REFERENCE = {field.name: "reference" for field in fields(KernelsConfig) if field.name != "strict"}
DELAYED = {
    "model": FAST,
    "training": {"precision": "bf16", "max_samples": 48},
    "precision": {"feed_forward": "fp8_te", "text": "fp8_native", "fp8_recipe": "delayed"},
    "kernels": REFERENCE,
}


@pytest.fixture
def on_h100(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's stand-in, chosen as on a GPU that has FP8."""
    monkeypatch.setattr(Target, "here", lambda: GPUS["h100"].target)


def losses(trainer: Any) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_fp8_trains_on_a_cpu(make_config, make_trainer):
    """Each of 10 losses is within 1 % of bfloat16's."""
    changes = {"model": FAST, "training": {"precision": "bf16", "max_samples": 40}}
    changes["logging"] = {"every_steps": 1}
    runs = {}
    for name in ("bf16", "fp8_native-current", "fp8_native-delayed"):
        linear, _, recipe = name.partition("-")
        precision = {"linear": linear, "fp8_recipe": recipe or "current"}
        config = make_config(name, **changes, precision=precision)
        trainer = make_trainer(config, [MetricsFile()])
        trainer.fit()
        runs[name] = losses(trainer)
    bf16 = runs.pop("bf16")
    assert len(bf16) == 10
    for fp8 in runs.values():
        assert fp8 != bf16 and fp8 == pytest.approx(bf16, rel=0.01)
    assert runs["fp8_native-current"] != runs["fp8_native-delayed"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [True, False], ids=["recomputed", ""])
def test_resumed_with_native_scales_is_bit_identical(make_config, make_trainer, again):
    changes = {
        "model": {**FAST, "activation_checkpointing": again},
        "training": {"precision": "bf16", "max_samples": 28, "accumulate_steps": 2},
        "precision": {"feed_forward": "fp8_native", "fp8_recipe": "delayed"},
    }
    whole = make_trainer(make_config("whole", **changes), [Checkpointer()])
    whole.fit()
    config = make_config("stopped", **changes)
    make_trainer(config, [StopAt(4), Checkpointer()]).fit()
    resumed = make_trainer(config, [Checkpointer()], resume=True)
    resumed.fit()
    assert_bit_identical(final_tensors(resumed.folder), final_tensors(whole.folder))
    saved, kept = (load_component(t.store.newest(), "precision_state") for t in (whole, resumed))
    assert set(saved) == {f"delayed_scaling.{name}" for name in ("amax", "inverse", "history")}
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    # A step ends with the update, so that a checkpoint lies between two steps.
    assert not saved["delayed_scaling.amax"].any()
    assert saved["delayed_scaling.history"].count_nonzero(0).min() >= 3


@pytest.mark.slow
def test_resumed_with_delayed_scales_is_bit_identical(on_h100, make_config, make_trainer):
    whole = make_trainer(make_config("whole", **DELAYED), [Checkpointer()])
    whole.fit()
    assert fake_te.state.updates == whole.steps
    config = make_config("stopped", **DELAYED)
    make_trainer(config, [StopAt(7), Checkpointer()]).fit()
    fake_te.state.seen.clear()
    resumed = make_trainer(config, [Checkpointer()], resume=True)
    resumed.fit()
    assert_bit_identical(final_tensors(resumed.folder), final_tensors(whole.folder))
    newest = resumed.store.newest()
    assert load_component(newest, "model").keys() == resumed.unet.state_dict().keys()
    saved, kept = load_component(newest, "precision_state"), precision_state(resumed.unet)
    assert saved.keys() == kept.keys() and all(
        torch.equal(saved[name], kept[name]) for name in kept
    )


def test_a_checkpoint_without_scales_is_not_taken_for_one_with(on_h100, make_config, make_trainer):
    trainer = make_trainer(make_config("with", **DELAYED), [StopAt(3), Checkpointer()])
    trainer.fit()
    path = trainer.store.newest()
    reseal(path, drop_scales)
    with pytest.raises(CheckpointError, match="holds no precision_state"):
        trainer.load(path)


def drop_scales(state: dict[str, Any]) -> None:
    for name in [name for name in state["tensors"] if name.startswith("precision_state.")]:
        del state["tensors"][name]


@pytest.mark.parametrize(
    ("target", "kernels", "words"),
    [
        (
            Target("cpu", "cpu"),
            {},
            "fp8_te' cannot be used; .* cannot be had on cpu: needs a CUDA GPU",
        ),
        (GPUS["a100"].target, REFERENCE, "needs compute capability 8.9, A100 has 8.0"),
        (GPUS["h100"].target, REFERENCE, "No module named 'transformer_engine'; pip install"),
    ],
    ids=["cpu", "a100", "not installed"],
)
def test_what_cannot_be_had_stops_before_anything_is_built(
    target, kernels, words, make_config, monkeypatch, tmp_path
):
    monkeypatch.setattr(Target, "here", lambda: target)
    monkeypatch.setattr("sd_perf.training.launch.build_trainer", lambda *_: pytest.fail("built"))
    config = make_config("run", **{**DELAYED, "kernels": kernels})
    with pytest.raises(ConfigError, match=f"^precision.feed_forward: .*{words}"):
        launch(config, start_world("cpu"), resume=False, fresh=False, console=None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_steps_are_the_steps(make_config, make_trainer):
    """By inductor, of a UNet of one level and a transformer in its middle; each loss depends on the
    updates before."""
    small = {"channel_mult": [1], "attention_resolutions": []}
    options = {"training": {"precision": "fp32", "max_samples": 24}, "logging": {"every_steps": 1}}
    runs = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        config = make_config(str(compiled), model={**FAST, **small, "compile": compiled}, **options)
        runs.append(make_trainer(config, [MetricsFile()]))
        runs[-1].fit()
        assert counters["stats"]["unique_graphs"] == compiled
    eager, ours = runs
    assert len(set(losses(eager))) == 6
    assert losses(ours) == pytest.approx(losses(eager), rel=1e-5)
    assert ours.step.state().keys() == eager.step.state().keys()
