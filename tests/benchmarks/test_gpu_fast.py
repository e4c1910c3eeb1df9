"""The fast iteration, its checks and its profile, on a CPU through reference operators: no number
is a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_checks, gpu_profile
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
from sd_kernels.registry import all_ops
from sd_perf.config import KernelsConfig, UNetConfig
from sd_perf.models.key_maps import to_diffusers
from sd_perf.reference.unet import UNet

TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    attention_resolutions=(1, 2),
    num_head_channels=32,
    context_dim=32,
    transformer_groups=8,
)
SIZES = {"latent_size": 8, "context_tokens": 5}
PLAIN_BF16 = replace(MASTERS, attention=SDPBackend.MATH)
YARDSTICKS = (FP32, PLAIN_BF16, FAST_FP8.yardstick)
ITERATIONS = 3


def fast_workload(
    recipe: FastRecipe = FAST_BF16, wrap: Callable[[str, Op], Op] = unwrapped
) -> FastWorkload:
    return FastWorkload(recipe, TINY, 2, "cpu", wrap=wrap, **SIZES)


def trained(workload: Any) -> gpu_checks.Trained:
    return gpu_checks.train(workload, workload.iteration, ITERATIONS)


@pytest.fixture(scope="module")
def plain() -> dict[str, gpu_checks.Trained]:
    return {
        recipe.implementation: trained(recipe.workload(TINY, 2, "cpu", **SIZES))
        for recipe in YARDSTICKS
    }


def verdict(
    recipe: FastRecipe, mine: gpu_checks.Trained, plain: dict[str, gpu_checks.Trained]
) -> dict[str, bool]:
    assert recipe.yardstick
    checks = gpu_checks.compare_training(
        recipe, mine, plain[recipe.yardstick.implementation], plain["plain_fp32"]
    )
    return {check["check"].partition(": ")[2]: check["passed"] for check in checks}


@pytest.mark.parametrize("recipe", FAST_CHECKED, ids=lambda recipe: recipe.implementation)
def test_it_trains_as_the_plain_one(
    recipe: FastRecipe, plain: dict[str, gpu_checks.Trained]
) -> None:
    workload = fast_workload(recipe)
    mine = trained(workload)
    assert all(verdict(recipe, mine, plain).values())
    assert torch.count_nonzero(mine.update) > 0.9 * mine.update.numel()
    assert gpu_checks.passed(gpu_checks.check_inputs(workload, "fast"))


@pytest.mark.parametrize("recipe", FAST_CHECKED, ids=lambda recipe: recipe.implementation)
def test_reset_and_replays_are_exact(recipe: FastRecipe) -> None:
    workload = fast_workload(recipe)
    start = [tensor.clone() for tensor in workload.state()]
    trained(workload)
    assert gpu_checks.differing(workload.state(), start)
    workload.reset()
    assert gpu_checks.differing(workload.state(), start) == 0
    checks = gpu_checks.check_replay(workload, lambda: workload.iteration, recipe)
    assert [check["error"] for check in checks] == [0, 0, 0]


def test_a_forgotten_remainder_is_red(plain: dict[str, gpu_checks.Trained]) -> None:
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


def test_draws_of_other_samples_are_red(plain: dict[str, gpu_checks.Trained]) -> None:
    def other(name: str, op: Op) -> Op:
        def draw(moments: torch.Tensor, indices: torch.Tensor, *tables: Any, **options: Any) -> Any:
            return op(moments, indices + 1, *tables, **options)

        return draw if name == "diffusion_inputs" else op

    workload = fast_workload(wrap=other)
    assert not verdict(FAST_BF16, trained(workload), plain)["losses of training"]
    assert [check["passed"] for check in gpu_checks.check_inputs(workload, "fast")] == [False] * 3


def test_a_parameter_outside_the_buffer_is_red() -> None:
    workload: Any = fast_workload()
    weight = workload.unet.out[2].weight
    weight.data = weight.data.clone()
    checks = gpu_checks.guarded("fast_bf16: steps", lambda: [trained(workload)])  # type: ignore[list-item]
    assert not gpu_checks.passed(checks)
    assert "out.2.weight has left the flat buffer" in checks[0]["note"]


def test_a_start_of_other_weights_is_red(plain: dict[str, gpu_checks.Trained]) -> None:
    workload = FastWorkload(FAST_BF16, TINY, 2, "cpu", seed=1, **SIZES)
    assert not verdict(FAST_BF16, trained(workload), plain)["masters unlike the plain start"]


def test_the_rule_follows_the_yardstick() -> None:
    recipes = (*YARDSTICKS, *FAST_CHECKED)
    checks = gpu_checks.check_precisions(TINY, 8, recipes, "cpu", "cpu", gradients=True)
    assert gpu_checks.passed(checks)
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
    checks = gpu_checks.check_precisions(TINY, 8, (FP32, unsafe), "cpu", "cpu", gradients=True)
    assert [check["passed"] for check in checks] == [True, True, False, False, False]
    assert not gpu_checks.check_precisions(
        TINY, 8, (replace(FAST_BF16, yardstick=None),), "cpu", "cpu", gradients=False
    )


def test_one_wrong_gradient_is_red() -> None:
    exact = [torch.ones(4).double(), torch.ones(1000).double(), torch.full((2,), 1e-2).double()]
    wrong = [exact[0], exact[1], torch.zeros(2)]
    errors = gpu_checks._errors(wrong, exact)
    assert errors["gradients"] < 1e-3
    assert errors[gpu_checks.WORST] == 1.0
    assert gpu_checks._errors(exact, exact)[gpu_checks.WORST] == 0.0


def test_steps_are_checked_in_one_go() -> None:
    checks = gpu_checks.check_steps(replace(FAST_BF16, yardstick=PLAIN_BF16), TINY, 8, "cpu", 1)
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
    assert gpu_checks.check_launches("fast", kernels, launches)["passed"]
    check = gpu_checks.check_launches("fast", kernels, Counter({"geglu_forward_kernel": 3}))
    assert not check["passed"]
    assert check["note"].endswith("silent: v_mse_loss")
    assert not gpu_checks.check_launches("fast", kernels, Counter())["passed"]
    assert not gpu_checks.check_launches("fast", {"linear": "torch"}, Counter())["passed"]


def test_launches_of_kernels_are_counted(plain: dict[str, gpu_checks.Trained]) -> None:
    """The two smallest operators on their kernels, which Triton's interpreter runs here."""
    named = {"diffusion_inputs": "triton", "v_mse_loss": "triton"}
    workload = fast_workload(replace(FAST_BF16, sections={"kernels": named}))
    mine = trained(workload)
    assert all(verdict(FAST_BF16, mine, plain).values())
    assert gpu_checks.passed(gpu_checks.check_inputs(workload, "fast"))
    check = gpu_checks.check_launches("fast", workload.kernels, mine.launches)
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
    checks = [gpu_checks.make_check(red, 1.0, 0.0), gpu_checks.make_check("draws: words", 0.0, 0.0)]
    assert bool(gpu_checks.against(recipe, checks)) == is_against


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


@dataclass
class FakeEvent:
    """As much of a profiler's event as is read."""

    name: str
    cpu_parent: FakeEvent | None = None
    sequence_nr: int = -1
    scope: int = 0
    kernels: Any = ()
    start: float = 0.0

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=self.start)


def kernel(name: str, microseconds: float) -> Any:
    return SimpleNamespace(name=name, duration=microseconds)


def test_kernels_are_grouped_by_where_they_were_launched() -> None:
    conv = FakeEvent(
        "sd_perf op conv", start=1, kernels=[kernel("sd_perf op conv", 999.0)]
    )  # the range's own copy
    made = FakeEvent("aten::convolution", conv, sequence_nr=7, start=2)
    forward = FakeEvent(
        "aten::cudnn_convolution", made, start=3, kernels=[kernel("implicit_gemm", 2000.0)]
    )
    cat = FakeEvent("aten::cat", None, sequence_nr=8, start=4, kernels=[kernel("cat", 100.0)])
    norm = FakeEvent("sd_perf op group_norm", start=5)
    # It takes no gradient, so that node 9 is of what follows.
    empty = FakeEvent("aten::empty", norm, sequence_nr=9, start=6)
    linear = FakeEvent("sd_perf op linear", start=7)
    product = FakeEvent(
        "aten::addmm", linear, sequence_nr=9, start=8, kernels=[kernel("gemm", 300.0)]
    )

    engine = FakeEvent(
        "autograd::engine::evaluate_function: ConvolutionBackward0", None, sequence_nr=7, start=10
    )
    node = FakeEvent("ConvolutionBackward0", engine, sequence_nr=7, scope=1, start=11)
    inner = [kernel("wgrad", 1500.0), kernel("wgrad", 500.0)]
    backward = FakeEvent("aten::convolution_backward", node, start=12, kernels=inner)
    summed = FakeEvent(
        "aten::add_", engine, start=13, kernels=[kernel("add", 50.0)]
    )  # of two gradients of one tensor
    engine = FakeEvent(
        "autograd::engine::evaluate_function: AddmmBackward0", None, sequence_nr=9, start=13.5
    )
    other = FakeEvent("AddmmBackward0", engine, sequence_nr=9, scope=1, start=14)
    custom = FakeEvent(
        "sd_kernels::layer_norm_backward", other, start=15, kernels=[kernel("ln", 70.0)]
    )
    product_back = FakeEvent("aten::mm", other, start=16, kernels=[kernel("gemm", 600.0)])
    column = FakeEvent(
        "sd_kernels::column_sum", custom, start=17, kernels=[kernel("column_sum", 30.0)]
    )

    events = [
        conv,
        made,
        forward,
        cat,
        norm,
        empty,
        linear,
        product,
        engine,
        node,
        backward,
        summed,
        other,
        custom,
    ]
    found = gpu_profile.by_op([*reversed(events), product_back, column])
    assert {op: (round(row["ms"], 3), row["kernels"]) for op, row in found.items()} == {
        "conv": (4.0, 3),
        "linear": (0.9, 2),
        "elementwise": (0.15, 2),
        "layer_norm": (0.1, 2),
    }
    assert found["conv"]["longest"] == {"implicit_gemm": 2.0, "wgrad": 2.0}

    rows = gpu_profile.compare(found, {"conv": 1.0, "linear": 0.8, "adamw": 7.5})
    assert [row["op"] for row in rows] == ["conv", "elementwise", "layer_norm", "linear", "adamw"]
    assert [row["ratio"] for row in rows] == [4.0, None, None, pytest.approx(1.125), 0.0]
    text = gpu_profile.lines({"status": "measured", "recipe": "fast", "batch": 64, "ops": rows})
    assert text[2].split() == ["conv", "4.00", "1.00", "4.00", "+3.00", "3"]
    assert text[-1].split() == ["sum", "5.15", "9.30", "0.55", "-4.15"]
    assert gpu_profile.lines({"status": "failed", "reason": "odd"}) == ["profile: failed: odd"]


def test_every_operator_is_found_in_a_real_profile() -> None:
    """Events of a CPU have no kernels: here what an event itself takes stands for them."""

    def own_time(event: Any) -> gpu_profile.Times:
        return [(event.name, event.self_cpu_time_total)] if event.name.startswith("aten::") else []

    events = gpu_profile.profile(FAST_BF16, TINY, 2, "cpu", **SIZES)
    found = gpu_profile.by_op(events, own_time)
    ops = set(gpu_profile.by_op(events, lambda event: [("", 1.0)]))
    workload = fast_workload()
    workload.iteration()
    assert ops == {*workload.kernels, "collect_gradients", "elementwise"}
    assert set(all_ops()) - ops == {"fp8_linear"}

    def kernels(part: str) -> set[str]:
        only = gpu_profile.by_op(
            events, lambda event: own_time(event) if part in event.name else []
        )
        return set(only)

    assert kernels("aten::convolution_backward") == {"conv", "upsample_conv"}
    assert kernels("native_layer_norm_backward") == {"layer_norm"}
    assert kernels("gelu_backward") == {"geglu"}
    assert kernels("attention_for_cpu_backward") == {"attention"}
    assert kernels("mse_loss_backward") == {"v_mse_loss"}
    assert "adamw" in kernels("aten::sqrt")
    assert kernels("_foreach_copy_") == {"collect_gradients"}
    assert found["linear"]["ms"] > 0
