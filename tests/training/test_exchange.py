"""Weight gradients that matmuls write into the flat buffer: the same as those that are moved."""

from __future__ import annotations

import copy

import pytest
import torch

from sd_kernels.weight_gradient import sink_of
from sd_perf.training.exchange import Exchange
from sd_perf.training.fast_step import FastStep
from tests.small_run import small_config, small_trainer


def iteration_of(folder, accumulate=1, **options):
    config = small_config(
        folder,
        model={"implementation": "fast"} | options.pop("model", {}),
        training={"accumulate_steps": accumulate} | options,
    )
    trainer = small_trainer(config)
    assert isinstance(trainer.step, FastStep)
    # The last layers of blocks are zero at first, and with them most gradients.
    torch.manual_seed(1)
    masters = {name: torch.randn(p.shape) * 0.05 for name, p in trainer.unet.named_parameters()}
    trainer.step.iteration.flat.set_masters(masters)
    for inputs in trainer.step.iteration.batches.inputs:
        inputs.draw(config, seed=3)
    return trainer.step.iteration


def without_sinks(iteration) -> None:
    for parameter in iteration.flat.parameters.values():
        if hasattr(parameter, "gradient_sink"):
            del parameter.gradient_sink


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"precision": "bf16"}),
        (2, {"precision": "bf16"}),
        (2, {"model": {"activation_checkpointing": True}}),
    ],
)
def test_they_are_those_that_are_moved(accumulate, options, tmp_path, monkeypatch):
    direct = iteration_of(tmp_path / "direct", accumulate, **copy.deepcopy(options))
    moved = iteration_of(tmp_path / "moved", accumulate, **copy.deepcopy(options))
    written: set[str] = set()
    write = Exchange.write

    def noted(self, gradient, names, dy, x):
        written.update(names)
        write(self, gradient, names, dy, x)

    monkeypatch.setattr(Exchange, "write", noted)
    without_sinks(moved)
    for iteration in (direct, moved):
        for _ in range(2):  # the second must not find anything of the first
            iteration.accumulate_gradients()
    # bfloat16 gradients are added in float32, where they are moved.
    is_mixed = accumulate > 1 and options.get("precision") == "bf16"
    matrices = {
        name
        for name, parameter in direct.flat.parameters.items()
        if parameter.dim() > 1 and parameter.shape[2:].numel() == 1
    }
    assert written == (set() if is_mixed else matrices)
    assert any(name.endswith("to_k.weight") for name in matrices)
    assert any(name.endswith("skip_connection.weight") for name in matrices)
    expected = moved.flat.views(moved.flat.grads)
    for name, gradient in direct.flat.views(direct.flat.grads).items():
        # Sums of micro-batches are rounded once more where they are moved.
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(expected[name].abs().max())}
        same = {"rtol": 0, "atol": 0} if accumulate == 1 or is_mixed else tolerance
        torch.testing.assert_close(gradient, expected[name], **same, msg=name)
        assert gradient.any(), name
    assert all(parameter.grad is None for parameter in direct.flat.parameters.values())


def test_copies_casts_and_frozen_weights_go_the_ordinary_way(tmp_path):
    flat = iteration_of(tmp_path / "run").flat
    weight = next(p for name, p in flat.parameters.items() if name.endswith("to_q.weight"))
    assert sink_of(weight) is not None
    assert sink_of(weight.bfloat16()) is None
    assert sink_of(copy.deepcopy(weight)) is None
    with torch.no_grad():
        assert sink_of(weight) is None
    assert sink_of(weight.requires_grad_(False)) is None
