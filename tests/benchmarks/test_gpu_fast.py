"""The fast iteration and its checks, on a CPU by reference operators: no number is a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.checks import differing, guarded, make_check, passed
from benchmarks.gpu_checks import full_network, small_network, unproven
from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import (
    FAST_BF16,
    FAST_CHECKED,
    FAST_FP8,
    FAST_FP32,
    FastRecipe,
    FastWorkload,
    Op,
    unwrapped,
)
from benchmarks.gpu_workload import (
    AUTOCAST,
    DIFFUSERS,
    FP32,
    MASTERS,
    PlainWorkload,
    Recipe,
    randomize,
)
from benchmarks.network_checks import WORST, check_precisions, precision_errors
from benchmarks.training_checks import (
    Trained,
    check_inputs,
    check_launches,
    check_replay,
    check_steps,
    compare_training,
    train,
)
from sd_perf.config import KernelsConfig
from sd_perf.fast.unet import FastUNet
from sd_perf.models.key_maps import to_diffusers
from sd_perf.reference.unet import UNet
from tests.benchmarks.tiny import SIZES, TINY

pytestmark = pytest.mark.slow

PLAIN_BF16 = replace(MASTERS, attention=SDPBackend.MATH)
YARDSTICKS = (FP32, PLAIN_BF16, FAST_FP8.yardstick)
ITERATIONS = 3


def fast_workload(
    recipe: FastRecipe = FAST_BF16, wrap: Callable[[str, Op], Op] = unwrapped
) -> FastWorkload:
    return FastWorkload(recipe, TINY, 2, "cpu", wrap=wrap, **SIZES)


def trained(workload: Any) -> Trained:
    return train(workload, workload.iteration, ITERATIONS)


@pytest.fixture(scope="module")
def plain() -> dict[str, Trained]:
    return {
        recipe.implementation: trained(recipe.workload(TINY, 2, "cpu", **SIZES))
        for recipe in YARDSTICKS
    }


def verdict(recipe: FastRecipe, mine: Trained, plain: dict[str, Trained]) -> dict[str, bool]:
    assert recipe.yardstick
    checks = compare_training(
        recipe, mine, plain[recipe.yardstick.implementation], plain["plain_fp32"]
    )
    return {check["check"].partition(": ")[2]: check["passed"] for check in checks}


@pytest.mark.parametrize("recipe", FAST_CHECKED, ids=lambda recipe: recipe.implementation)
def test_it_trains_as_the_plain_one(recipe: FastRecipe, plain: dict[str, Trained]) -> None:
    workload = fast_workload(recipe)
    mine = trained(workload)
    assert all(verdict(recipe, mine, plain).values())
    assert torch.count_nonzero(mine.update) > 0.9 * mine.update.numel()
    assert passed(check_inputs(workload, "fast"))


@pytest.mark.parametrize("recipe", FAST_CHECKED, ids=lambda recipe: recipe.implementation)
def test_reset_and_replays_are_exact(recipe: FastRecipe) -> None:
    workload = fast_workload(recipe)
    start = [tensor.clone() for tensor in workload.state()]
    trained(workload)
    assert differing(workload.state(), start)
    workload.reset()
    assert differing(workload.state(), start) == 0
    checks = check_replay(workload, lambda: workload.iteration, recipe)
    assert [check["error"] for check in checks] == [0, 0, 0]


def test_a_forgotten_remainder_is_red(plain: dict[str, Trained]) -> None:
    def forget(name: str, op: Op) -> Op:
        def adamw(
            weights: torch.Tensor, remainders: torch.Tensor, *others: Any, **options: Any
        ) -> None:
            op(weights, remainders, *others, **options)
            remainders.zero_()

        return adamw if name == "adamw" else op

    found = verdict(FAST_BF16, trained(fast_workload(wrap=forget)), plain)
    assert found["masters unlike the plain start"]
    assert not found["updates of AdamW"]


def test_draws_of_other_samples_are_red(plain: dict[str, Trained]) -> None:
    def other(name: str, op: Op) -> Op:
        def draw(moments: torch.Tensor, indices: torch.Tensor, *tables: Any, **options: Any) -> Any:
            return op(moments, indices + 1, *tables, **options)

        return draw if name == "diffusion_inputs" else op

    workload = fast_workload(wrap=other)
    assert not verdict(FAST_BF16, trained(workload), plain)["losses of training"]
    assert [check["passed"] for check in check_inputs(workload, "fast")] == [False] * 3


def test_a_parameter_outside_the_buffer_is_red() -> None:
    workload: Any = fast_workload()
    weight = workload.unet.out[2].weight
    weight.data = weight.data.clone()
    checks = guarded("steps", lambda: [trained(workload)], recipe="fast_bf16")  # type: ignore[list-item]
    assert not passed(checks)
    assert "out.2.weight has left the flat buffer" in checks[0]["note"]


def test_a_start_of_other_weights_is_red(plain: dict[str, Trained]) -> None:
    workload = FastWorkload(FAST_BF16, TINY, 2, "cpu", seed=1, **SIZES)
    assert not verdict(FAST_BF16, trained(workload), plain)["masters unlike the plain start"]


def test_the_rule_follows_the_yardstick() -> None:
    recipes = (*YARDSTICKS, *FAST_CHECKED)
    checks = check_precisions(TINY, 8, recipes, "cpu", "cpu", gradients=True)
    assert passed(checks)
    errors = {check["check"]: check["error"] for check in checks}
    budgets = {check["check"]: check["budget"] for check in checks}
    assert len(checks) == 2 + 2 + 3 * len(FAST_CHECKED)
    assert budgets["fast_bf16: output"] == pytest.approx(
        2 * errors["plain_bf16_masters: output"], rel=1e-3
    )
    assert errors["fast_fp32: gradients"] < 1e-5 < errors["fast_bf16: gradients"]

    unsafe = replace(
        FAST_BF16, implementation="fast_fp32", yardstick=FP32
    )  # bf16 that claims to be fp32
    checks = check_precisions(TINY, 8, (FP32, unsafe), "cpu", "cpu", gradients=True)
    assert [check["passed"] for check in checks] == [True, True, False, False, False]
    assert not check_precisions(
        TINY, 8, (replace(FAST_BF16, yardstick=None),), "cpu", "cpu", gradients=False
    )


def test_the_fast_network_is_the_one_that_is_checked() -> None:
    for recipe in FAST_CHECKED:
        assert isinstance(recipe.unet(TINY, "cpu"), FastUNet)
    assert isinstance(MASTERS.unet(TINY, "cpu"), UNet)


def test_one_wrong_gradient_is_red() -> None:
    exact = [torch.ones(4).double(), torch.ones(1000).double(), torch.full((2,), 1e-2).double()]
    wrong = [exact[0], exact[1], torch.zeros(2)]
    errors = precision_errors(wrong, exact)
    assert errors["gradients"] < 1e-3
    assert errors[WORST] == 1.0
    assert precision_errors(exact, exact)[WORST] == 0.0


def test_steps_are_checked_in_one_go() -> None:
    checks = check_steps(replace(FAST_BF16, yardstick=PLAIN_BF16), TINY, 8, "cpu", 1)
    red = [check["check"] for check in checks if not check["passed"]]
    assert len(checks) == 7
    assert red == [
        "fast_bf16: operators on Triton without a launch (no such operator counts as one)"
    ]


def test_zero_launches_are_red() -> None:
    import sd_kernels.geglu.triton
    import sd_kernels.v_mse_loss.triton  # noqa: F401

    kernels = {"geglu": "triton", "v_mse_loss": "triton", "linear": "torch"}
    launches = Counter({"geglu_forward_kernel": 3, "v_mse_loss_backward_kernel": 1})
    assert check_launches("fast", kernels, launches)["passed"]
    check = check_launches("fast", kernels, Counter({"geglu_forward_kernel": 3}))
    assert not check["passed"]
    assert check["note"].endswith("silent: v_mse_loss")
    assert not check_launches("fast", kernels, Counter())["passed"]
    assert not check_launches("fast", {"linear": "torch"}, Counter())["passed"]


def test_launches_of_kernels_are_counted(plain: dict[str, Trained]) -> None:
    """The two smallest operators on their kernels, which Triton's interpreter runs here."""
    named = {"diffusion_inputs": "triton", "v_mse_loss": "triton"}
    workload = fast_workload(replace(FAST_BF16, sections={"kernels": named}))
    mine = trained(workload)
    assert all(verdict(FAST_BF16, mine, plain).values())
    assert passed(check_inputs(workload, "fast"))
    check = check_launches("fast", workload.kernels, mine.launches)
    assert check["passed"]
    assert check["note"].startswith(f"{3 * ITERATIONS} launches")


@pytest.mark.parametrize(
    ("red", "recipe", "is_against"),
    [
        ("draws: normals", FAST_BF16, True),
        ("plain_bf16_masters: output", FAST_BF16, True),
        ("plain_bf16_masters: output", AUTOCAST, True),
        ("fast_bf16: output", FAST_BF16, True),
        ("fast_bf16: output", AUTOCAST, False),
        ("fast_bf16: output", FAST_FP32, False),
        ("fast_fp32: output", FAST_BF16, True),
        ("fast_fp32: output", MASTERS, False),
    ],
)
def test_what_a_red_check_stands_against(red: str, recipe: Recipe, is_against: bool) -> None:
    name, _, what = red.rpartition(": ")
    checks = [make_check(what, 1.0, 0.0, recipe=name), make_check("draws: words", 0.0, 0.0)]
    done = {group.title for group in (*small_network(Device()), *full_network(Device()))}
    assert checks[0]["check"] == red
    assert unproven(recipe, checks, done) == (red if is_against else None)


@pytest.mark.parametrize(
    ("missing", "recipe", "is_against"),
    [
        ("draws", AUTOCAST, True),
        ("full network", FAST_BF16, True),
        ("fast_bf16: capture", FAST_BF16, True),
        ("fast_bf16: a step of the full network", FAST_BF16, True),
        ("fast_fp32: steps of the small network", FAST_BF16, True),
        ("fast_fp8: capture", FAST_BF16, False),
        ("fast_fp8: capture", FAST_FP8, True),
        ("fast_bf16: capture", AUTOCAST, False),
        ("plain_autocast: capture", AUTOCAST, True),
    ],
)
def test_what_has_not_been_checked_is_not_proven(
    missing: str, recipe: Recipe, is_against: bool
) -> None:
    titles = {group.title for group in (*small_network(Device()), *full_network(Device()))}
    assert missing in titles
    green = [make_check("draws: words", 0.0, 0.0)]
    expected = f"{missing} (not checked yet)" if is_against else None
    assert unproven(recipe, green, titles - {missing}) == expected


def test_a_recipe_is_settings() -> None:
    recipe = replace(FAST_BF16, sections={"kernels": {"geglu": "reference", "strict": False}})
    config = recipe.fast_config(TINY)
    assert (config.model.implementation, config.training.precision) == ("fast", "bf16")
    assert config.kernels == KernelsConfig(geglu="reference")
    assert FAST_FP32.fast_config(TINY).training.precision == "fp32"
    assert recipe.choices(TINY)["adamw"].backend == "reference"
    assert FAST_FP32.choices(TINY)["adamw"].backend == "torch"


def test_diffusers_network_is_the_plain_one() -> None:
    pytest.importorskip("diffusers")
    plain = UNet(TINY)
    randomize(plain, 0)
    network: Any = DIFFUSERS.unet(TINY, "cpu")
    network.model.load_state_dict(to_diffusers(plain.state_dict(), TINY))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)
    workload = PlainWorkload(DIFFUSERS, TINY, 2, "cpu", **SIZES)
    workload.iteration()
    assert torch.isfinite(workload.loss)
