from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import harness
from sd_kernels.errors import KernelError
from sd_kernels.fp8_linear import SPEC
from sd_kernels.fp8_linear.quantise import fp8_quantise
from sd_kernels.fp8_linear.reference import FORWARD, GRADIENT, quantise
from sd_kernels.fp8_linear.reference import fp8_linear as reference
from sd_kernels.fp8_linear.scaling import Scales
from sd_kernels.fp8_linear.triton import fp8_linear
from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import BATCH
from sd_kernels.spec import Inputs
from tests.kernels import fake_te
from tests.kernels.faults import assert_caught, planted

CASES = {case.name: case for case in SPEC.small_cases}


SCALE_OF_ANOTHER = (
    "weight_gradient(grad, transposed, scale, dtype)",
    "weight_gradient(grad, transposed, weight_scale, dtype)",
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("77 tokens", SCALE_OF_ANOTHER),
        (
            "after LayerNorm",
            ("mean, rstd, bits, weight", "mean, rstd, bits - (1 << 22), weight"),
        ),
        (
            "after GEGLU",
            ("dx = geglu_backward(*kept, dx)", "dx = geglu_backward(kept[0].roll(64, -1), dx)"),
        ),
        (
            "after LayerNorm",
            ("layer_norm_backward(*kept, dx, grads[1])", "layer_norm_backward(*kept, dx, None)"),
        ),
        ("after LayerNorm", ("weight, bias, residual, eps\n", "weight, bias, residual, 1.0\n")),
        ("77 tokens", ("column_sum(grad, grad.dtype)", "column_sum(grad[:-1], grad.dtype)")),
        ("77 tokens", ("dtype, bias, fast=True", "dtype, None, fast=True")),
        ("delayed", SCALE_OF_ANOTHER),
        ("delayed after LayerNorm", ("result * scale", "result * (scale * 1.2)")),
        ("delayed feed-forward", ("tl.store(place + K, dgate,", "tl.store(place + K, dvalue,")),
        ("delayed feed-forward", ("transposed + K * P.to(tl.int64), dgate", "transposed, dgate")),
        ("delayed feed-forward", ("tl.sum(dgate, 0)", "tl.sum(dvalue, 0)")),
    ],
    ids=[
        "weights' scale for the values'",
        "stale scale",
        "halves swapped in backward",
        "gradient of the sum lost",
        "wrong eps",
        "last row left out of the bias",
        "bias forgotten",
        "delayed: weights' scale for the values'",
        "delayed: stale scale",
        "delayed: gate's gradient is the value's",
        "delayed: gate's transposed gradient unwritten",
        "delayed: gate's bias gradient is the value's",
    ],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str]) -> None:
    assert_caught("fp8_linear", CASES[case], fault, dtype=torch.bfloat16)


def rows_lost(function: Any) -> int:
    """The number of rows of dx with an error above a quarter, for rows of dy from 2^0 to 2^-27."""
    x, weight = (
        torch.randn(28, 64, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(32, 64).bfloat16(),
    )
    grad = (torch.randn(28, 32) * 2.0 ** -torch.arange(28.0)[:, None]).bfloat16()
    (dx,) = torch.autograd.grad(function(x, weight), x, grad)
    exact = grad.float() @ weight.float()
    return int(((dx - exact).norm(dim=1) > 0.25 * exact.norm(dim=1)).sum())


def test_gradients_have_the_range_of_e5m2() -> None:
    torch.manual_seed(0)
    assert rows_lost(fp8_linear) == 0
    with planted(
        "fp8_linear", ("fp8_quantise(grad, GRADIENT)", "fp8_quantise(grad, FORWARD)")
    ) as e4m3:
        assert rows_lost(e4m3) > 5


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_numbers_and_their_transpose_equal_plain_torch(dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(150, 80, generator=torch.Generator().manual_seed(2)) * scale
    numbers, transposed, inverse = fp8_quantise(x, dtype)
    expected, expected_inverse = quantise(x, dtype)
    assert torch.equal(inverse, expected_inverse)
    assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8))
    assert transposed.shape == (80, 160)
    assert torch.equal(
        transposed[:, :150].view(torch.uint8), expected.t().contiguous().view(torch.uint8)
    )
    assert not transposed[:, 150:].float().any()


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    numbers, _, inverse = fp8_quantise(torch.zeros(16, 16), FORWARD)
    assert inverse == 1.0
    assert not numbers.float().any()
    broken = torch.ones(16, 16)
    broken[3, 4] = float("nan")
    numbers, _, inverse = fp8_quantise(broken, FORWARD)
    assert inverse.isnan()


BAD = {"x": torch.zeros(4, 32).bfloat16(), "weight": torch.zeros(16, 32).bfloat16()}
NORM = {
    "producer": "layer_norm",
    **dict.fromkeys(("norm_weight", "norm_bias"), torch.zeros(32).bfloat16()),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(4, 32)}, "one dtype"),
        ({"x": torch.zeros(4, 32), "weight": torch.zeros(16, 32)}, "bfloat16 or float16"),
        ({"bias": torch.zeros(15).bfloat16()}, r"bias of shape \(15,\); takes \(16,\)"),
        (
            {**NORM, "norm_weight": torch.zeros(31).bfloat16()},
            r"norm_weight of shape \(31,\); takes \(32,\)",
        ),
        (
            {**NORM, "norm_bias": torch.zeros(2, 32).bfloat16()},
            r"norm_bias of shape \(2, 32\); takes \(32,\)",
        ),
        (
            {**NORM, "residual": torch.zeros(3, 32).bfloat16()},
            r"residual of shape \(3, 32\); takes \(4, 32\)",
        ),
        ({"weight": torch.zeros(16, 40).bfloat16()}, "multiples of 16"),
        ({"x": torch.zeros(4, 48).bfloat16()}, "a last axis of 32"),
        ({"producer": "gelu"}, "none, geglu, layer_norm"),
        ({"producer": "layer_norm"}, "other parts than its own"),
        ({"norm_weight": torch.zeros(32).bfloat16()}, "other parts than its own"),
        ({"x": torch.zeros(0, 32).bfloat16()}, "empty shape"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        fp8_linear(**{**BAD, **changes})


def test_a_step_has_the_linear_layers_of_its_transformer_blocks() -> None:
    flops = sum(case.calls * SPEC.work(case, torch.bfloat16).flops for case in SPEC.cases)
    # Projections of 3, 1, 1, 1, 8 and 4 times C x C for each token.
    tokens = ((4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1))
    assert flops == sum(blocks * 2 * BATCH * L * 18 * C**2 for L, C, blocks in tokens)
    in_16_bits = ("projection", "keys and values", "time", "all time")
    linear = all_ops()["linear"]
    others = sum(
        case.calls * linear.work(case, torch.bfloat16).flops
        for case in linear.cases
        if not case.name.startswith(in_16_bits)
    )
    assert flops == others


@pytest.mark.parametrize("with_residual", [True, False])
def test_backward_of_the_sum_alone(with_residual: bool) -> None:
    x, residual, weight, *norm = (
        torch.randn(*shape).bfloat16() for shape in ((4, 32), (4, 32), (16, 32), (32,), (32,))
    )
    leaves = [x.requires_grad_(), residual.requires_grad_()][: 1 + with_residual]
    parts = {"residual": residual} if with_residual else {}
    _, summed = fp8_linear(
        x, weight, None, **parts, norm_weight=norm[0], norm_bias=norm[1], producer="layer_norm"
    )
    grad = torch.randn(4, 32).bfloat16()
    assert all(torch.equal(given, grad) for given in torch.autograd.grad(summed, leaves, grad))


class Matmuls(TorchDispatchMode):
    """Counts the matmuls that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._scaled_mm.default, aten.mm.default, aten.addmm.default)
        return func(*args, **(kwargs or {}))


SHAPES = {
    "x": (3, 32),
    "weight": (16, 32),
    "bias": (16,),
    "residual": (3, 32),
    "norm_weight": (32,),
    "norm_bias": (32,),
    "inner_weight": (64, 32),
    "inner_bias": (64,),
}
INPUT = {"x", "residual", "norm_weight", "norm_bias"}
PARTS = {
    "none": ("x", "weight", "bias"),
    "geglu": ("x", "weight", "bias"),
    "layer_norm": tuple(SHAPES)[:6],
    "feed_forward": tuple(SHAPES),
}


def matmuls_of(producer: str, needed: set[str]) -> int:
    """Matmuls of a backward pass in which these inputs need a gradient."""
    count = ("weight" in needed) + bool(needed & INPUT)
    if producer == "feed_forward":
        inner = {"inner_weight", "inner_bias"}
        count += ("inner_weight" in needed) + bool(needed & (INPUT | inner))
    return count


@pytest.mark.parametrize(
    ("producer", "frozen"),
    [(producer, part) for producer, parts in PARTS.items() for part in parts]
    + [(producer, " ".join(sorted(INPUT))) for producer in ("layer_norm", "feed_forward")]
    + [("feed_forward", " ".join(sorted({*INPUT, "inner_weight", "inner_bias"})))],
)
@pytest.mark.sampled(5)
@pytest.mark.parametrize("function", [fp8_linear, reference], ids=["triton", "reference"])
def test_frozen_inputs_cost_no_matmul(function: Any, producer: str, frozen: str) -> None:
    """The others' gradients stay as they were, bit for bit."""
    generator = torch.Generator().manual_seed(3)
    shapes = SHAPES | ({"x": (3, 64)} if producer == "geglu" else {})
    tensors = {
        name: torch.randn(shapes[name], generator=generator).bfloat16() for name in PARTS[producer]
    }
    scales = Scales(torch.full((6,), 1 / 32), torch.zeros(6))
    options = {"scales": scales} if producer == "feed_forward" else {}

    def gradients(names: list[str]) -> tuple[dict[str, torch.Tensor | None], int]:
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in tensors.items()}
        outputs = function(**leaves, producer=producer, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        with Matmuls() as matmuls:
            sum(output.sum() for output in outputs if output.requires_grad).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}, matmuls.count

    everything, count = gradients(list(tensors))
    assert count == matmuls_of(producer, set(tensors)) == (4 if options else 2)
    needed = [name for name in tensors if name not in frozen.split()]
    some, fewer = gradients(needed)
    assert fewer == matmuls_of(producer, set(needed))
    for name, grad in some.items():
        whole = everything[name]
        assert (grad is None) == (name not in needed)
        assert grad is None or (whole is not None and torch.equal(grad, whole))


@pytest.mark.parametrize("name", ["77 tokens", "after GEGLU", "after LayerNorm"])
def test_transformer_engine_is_called_with_its_signature(te: Any, name: str) -> None:
    assert all(verdict.ok for verdict in harness.check(SPEC, "te", CASES[name], torch.float32))
    assert fake_te.state.rows == te.padded_rows(CASES[name].shape["L"])


def test_transformer_engine_draws_no_random_number(te: Any) -> None:
    inputs = SPEC.inputs(CASES["after LayerNorm"], Inputs(CASES["after LayerNorm"], torch.float32))
    before = torch.get_rng_state()
    te.fp8_linear(**inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_recipes_are_hybrid_and_named(te: Any) -> None:
    assert te.make_recipe("current") == {"fp8_format": "hybrid"}
    assert te.make_recipe("delayed") == {
        "fp8_format": "hybrid",
        "amax_history_len": 16,
        "amax_compute_algo": "max",
    }
    with pytest.raises(KernelError, match="delayed or current"):
        te.make_recipe("block")
    with pytest.raises(KernelError, match="multiples of 16"):
        te.Linear(24, 16, True, "delayed", torch.bfloat16)


def test_precision_state_travels_beside_the_weights(te: Any) -> None:
    layers = {
        recipe: te.Linear(16, 16, True, recipe, torch.bfloat16) for recipe in ("delayed", "current")
    }
    assert {name: state.numel() for name, state in te.precision_state(layers).items()} == {
        "delayed": 0
    }
    layers["delayed"](torch.full((8, 16), 3.0).bfloat16())
    state = te.precision_state(layers)
    other = {"delayed": te.Linear(16, 16, True, "delayed", torch.bfloat16)}
    memory = other["delayed"].inner.scales
    te.load_precision_state(other, state)
    assert memory[2] == 3.0 and torch.equal(memory, layers["delayed"].inner.scales)
    with pytest.raises(KernelError, match=r"differ \(delayed\)"):
        te.load_precision_state(other, {})


def test_a_state_from_before_the_first_step_is_restored(te: Any) -> None:
    layers = {"into": te.Linear(16, 16, True, "delayed", torch.bfloat16)}
    before, scales = te.precision_state(layers), layers["into"].inner.scales.clone()
    layers["into"](torch.full((8, 16), 3.0).bfloat16())
    assert not torch.equal(layers["into"].inner.scales, scales)
    te.load_precision_state(layers, before)
    assert torch.equal(layers["into"].inner.scales, scales)


def test_one_pass_is_one_step_of_every_history(te: Any) -> None:
    layers = [te.Linear(16, 16, True, "delayed", torch.bfloat16) for _ in range(20)]
    with te.scaling_step("delayed"):
        for layer in layers:
            layer(torch.full((8, 16), 3.0).bfloat16())
    assert fake_te.state.updates == 1
    assert all(layer.inner.scales[2] == 3.0 for layer in layers)


def test_weights_of_a_call_are_the_ones_taken(te: Any) -> None:
    layer = te.Linear(32, 16, True, "current", torch.bfloat16, "meta")
    x, weight, bias = (
        torch.randn(2, 3, 32).bfloat16(),
        torch.randn(16, 32, requires_grad=True),
        torch.randn(16),
    )
    y = layer.with_weights(x, weight, bias)
    assert torch.equal(y, reference(x, weight.bfloat16(), bias.bfloat16()))
    assert torch.autograd.grad(y.sum(), weight)[0].count_nonzero()
