"""Parity can fail: a planted fault is red at its own level, under a name that leads to it.

The same level of the code without the fault is green.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache

import pytest
import torch

from sd_kernels.registry import all_ops
from sd_kernels.spec import Backend, Function
from sd_perf.config import Config
from sd_perf.data import order
from sd_perf.models import build
from sd_perf.presets import load_preset
from sd_perf.runs.parity_record import Level, Where
from sd_perf.tools.parity import (
    blocks,
    operators,
    optimizer_updates,
    sampler,
    training_step,
    whole_network,
)
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.parity_case import ParityCase
from tests.kernels.faults import planted, replaced

FEWER = {"group_norm": 1}
"""the first small cases alone, where the others take seconds and show the fault no better"""
Plant = Callable[[pytest.MonkeyPatch, ExitStack], None]


def smoke() -> Config:
    config = load_preset("configs/smoke.yaml")
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, implementation="fast")
    )


def compare(level: Level, where: Where, ops: tuple[str, ...] = ()) -> list[Comparison]:
    """All comparisons of a level; of level op those of these operators alone."""
    case = ParityCase.of(smoke(), where)
    if level == "op":
        specs = [all_ops()[name] for name in ops]
        kept = {
            spec.name: dataclasses.replace(
                spec, small_cases=spec.small_cases[: FEWER.get(spec.name)]
            )
            for spec in specs
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "all_ops", lambda: kept)
            return list(operators.compare_operators(case))
    levels: dict[str, Callable[[], Iterable[Comparison]]] = {
        "block": lambda: blocks.compare_blocks(case),
        "unet": lambda: whole_network.compare_networks(case, {"unet"}),
        "grad": lambda: whole_network.compare_networks(case, {"grad"}),
        "step": lambda: training_step.compare_steps(case),
    }
    return list(levels[level]())


@cache
def unplanted(level: Level, where: Where, ops: tuple[str, ...] = ()) -> list[Comparison]:
    return compare(level, where, ops)


def in_op(op: str, *replacements: tuple[str, str]) -> Plant:
    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        faulty, original = stack.enter_context(planted(op, *replacements)), Backend.function

        def function(self: Backend, name: str) -> Function:
            return faulty if self.ours and name == op else original(self, name)

        patch.setattr(Backend, "function", function)

    return plant


def in_unet(*replacements: tuple[str, str]) -> Plant:
    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        faulty = stack.enter_context(replaced("sd_perf.fast.unet", *replacements))
        patch.setattr(blocks, "fast", faulty)
        patch.setattr(build, "FastUNet", faulty.FastUNet)

    return plant


def in_module(module: str, user: object, name: str, *replacements: tuple[str, str]) -> Plant:
    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        patch.setattr(
            user, name, getattr(stack.enter_context(replaced(module, *replacements)), name)
        )

    return plant


def no_decay_on_biases(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    def build(unet: torch.nn.Module, config: Config) -> torch.optim.AdamW:
        named = list(unet.named_parameters())
        biases = [parameter for name, parameter in named if name.endswith("bias")]
        others = [parameter for name, parameter in named if not name.endswith("bias")]
        groups = [{"params": others}, {"params": biases, "weight_decay": 0.0}]
        betas = config.optimizer.beta_1, config.optimizer.beta_2
        return torch.optim.AdamW(groups, betas=betas)

    patch.setattr(optimizer_updates, "build_optimizer", build)


TANH = "tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))"
TAKEN_BY_RANK = "np.arange(position + rank, position + global_batch, world_size"
TAKEN_BY_ALL = "np.arange(position, position + global_batch // world_size"
FAULTS: dict[str, tuple[Level, Where, str, Plant]] = {
    "wrong eps": (
        "op",
        "interpreter",
        "group_norm",
        in_op("group_norm", ("/ (N * CPG) + eps)", "/ (N * CPG) + 1e-3)")),
    ),
    "swapped GEGLU halves": (
        "op",
        "interpreter",
        "geglu",
        in_op(
            "geglu", ("value * (gate * _normal_cdf(gate))", "gate * (value * _normal_cdf(value))")
        ),
    ),
    "tanh GELU": (
        "op",
        "interpreter",
        "geglu",
        in_op("geglu", ("0.5 * (1.0 + tl.erf(x * 0.7071067811865476))", TANH)),
    ),
    "stale FP8 scale": (
        "op",
        "interpreter",
        "fp8_linear",
        in_op(
            "fp8_linear",
            ("mean, rstd, bits, weight", "mean, rstd, bits - (1 << 22), weight"),
        ),
    ),
    "32 groups for 16": (
        "block",
        "structure",
        "ResBlock",
        in_unet(
            (
                "norm = Norm(groups, out_channels, eps=1e-5",
                "norm = Norm(2 * groups, out_channels, eps=1e-5",
            )
        ),
    ),
    "missing residual": (
        "block",
        "structure",
        "SpatialTransformer",
        in_unet(
            (
                "return Pending(as_image(out, summed), self.proj_out.bias, summed)",
                "return Pending(as_image(out, summed), self.proj_out.bias)",
            )
        ),
    ),
    "last transformer block skipped in the text encoder": (
        "block",
        "structure",
        blocks.TEXT_ENCODER,
        in_module(
            "sd_perf.models.text_encoder",
            blocks,
            "OpenClipTextEncoder",
            ("resblocks[:-1]", "resblocks[:-2]"),
        ),
    ),
    "sin and cos swapped": (
        "unet",
        "structure",
        "prediction",
        in_unet(("(angles.cos(), angles.sin())", "(angles.sin(), angles.cos())")),
    ),
    "gradient of the skips lost": (
        "grad",
        "structure",
        "",
        in_unet(("skips.append(summed)", "skips.append(summed.detach())")),
    ),
    "weight decay forgotten on biases": (
        "step",
        "structure",
        "AdamW's change of biases",
        no_decay_on_biases,
    ),
    "noise reused across ranks": (
        "step",
        "structure",
        training_step.NOISE_OF_RANKS,
        in_module("sd_perf.data.order", order, "rank_positions", (TAKEN_BY_RANK, TAKEN_BY_ALL)),
    ),
    "bfloat16 master instead of remainder": (
        "step",
        "interpreter",
        "masters",
        in_op(
            "adamw",
            ("_store(remainders, bits.to(tl.int16)", "_store(remainders, (bits * 0).to(tl.int16)"),
        ),
    ),
    "wrong alpha_prev at the last DDIM step": (
        "step",
        "structure",
        "DDIM's latents after its last step",
        in_module(
            "sd_perf.diffusion.ddim",
            sampler,
            "ddim_sample",
            ("timesteps[1:], 0]", "timesteps[1:], 1]"),
        ),
    ),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_red_at_its_level_and_named(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    level, where, name, plant = FAULTS[fault]
    ops = (name,) if level == "op" else ()
    good = unplanted(level, where, ops)
    assert good and all(line.ok for line in good), [line for line in good if not line.ok]
    with ExitStack() as stack:
        plant(monkeypatch, stack)
        bad = compare(level, where, ops)
    wrong = [line for line in bad if not line.ok]
    assert wrong and {line.name for line in bad} == {line.name for line in good}
    assert all(line.level == level and re.search(re.escape(name), line.name) for line in wrong), (
        wrong
    )
