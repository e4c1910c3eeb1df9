"""The plain training iteration that is timed."""

from __future__ import annotations

import torch

from benchmarks.gpu_workload import make_inputs, randomize
from sd_perf.config import Config, DiffusionConfig
from sd_perf.reference.step import DiffusionStep
from sd_perf.reference.unet import UNet
from sd_perf.training.optimizer import build_optimizer
from tests.benchmarks.tiny import RECIPES, SIZES, TINY, tiny_workload


def test_the_iteration_is_the_reference_step() -> None:
    workload = tiny_workload(RECIPES[0])
    unet = UNet(TINY)
    randomize(unet, seed=0)
    optimizer = build_optimizer(unet, Config())
    optimizer.param_groups[0]["lr"] = Config().learning_rate
    step = DiffusionStep(DiffusionConfig(), seed=0)
    indices = torch.arange(2)
    moments, context = make_inputs(TINY, indices, **SIZES, seed=0)
    for number in range(3):
        workload.iteration()
        optimizer.zero_grad()
        loss = step(unet, moments, context, indices + 2 * number)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(workload.loss, loss.detach(), rtol=1e-5, atol=0)
    for mine, plain in zip(workload.masters(), unet.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=2e-5)


def test_bf16_weights_are_the_rounded_masters() -> None:
    workload = tiny_workload(RECIPES[2])
    before = workload.masters()[0].clone()
    for _ in range(3):
        workload.iteration()
    assert not torch.equal(before, workload.masters()[0])
    for weight, master in zip(workload.unet.parameters(), workload.masters(), strict=True):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, master.bfloat16())
