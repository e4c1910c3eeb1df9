from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sd_kernels.errors import KernelError
from sd_kernels.layer_norm import SPEC, Extras
from sd_kernels.layer_norm.aten import layer_norm as torchs
from sd_kernels.layer_norm.triton import WIDEST, layer_norm
from sd_kernels.spec import Case, Draw, Inputs
from tests.kernels.faults import assert_caught

# There E[x^2] - E[x]^2 has no right digit; torch's own kernel for CPUs is beyond the rule too.
FAR = Case(
    "far from zero",
    {"B": 1, "L": 33, "C": 320},
    draw=Draw(mean=300.0, std=0.5),
    extras=Extras(residual=False),
)
CASES = {case.name: case for case in (*SPEC.small_cases, FAR)}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("ragged", ("/ C + eps)", "/ C + 2.0 * eps)")),
        (
            "far from zero",
            ("tl.sum(squares, 1) / C", "_sum_of_squares(tiles, K, ROWS) / C - row_mean * row_mean"),
        ),
        ("ragged", ("tl.where(_columns_of(i, is_row, C, K)[1], centred, 0.0)", "centred")),
        ("ragged", ("tile += _load(residual", "tile += 0.0 * _load(residual")),
        ("ragged", ("result += later", "result += 0.0 * later")),
        ("no residual", ("result += later", "result += 0.0 * later")),
        ("no residual", (" - normalised * mean_product", "")),
        ("no residual", ("dx_sums += result", "dx_sums += grad")),
        ("ragged", ("dsummed_sums += later", "dsummed_sums = later")),
        ("no residual", ("column_sum(partials,", "column_sum(partials[1:],")),
        ("shifted mean", ("M, tl.num_programs(0) * ROWS)", "M, M)")),
    ],
    ids=[
        "wrong eps",
        "one-pass variance",
        "columns outside in the variance",
        "no residual added",
        "gradient of the sum forgotten",
        "gradient of the returned x forgotten",
        "gradient along the norm forgotten",
        "bias of x without the norm's part",
        "bias of later use of the last rows alone",
        "a stripe of the weight's gradient missing",
        "a stripe's later rows missing",
    ],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str]) -> None:
    one_pass = "@triton.jit\ndef _sum_of_squares(tiles, K: tl.constexpr, ROWS: tl.constexpr):\n"
    one_pass += (
        "    squares = tl.zeros((ROWS, K), tl.float32)\n    for i in tl.static_range(TILES):\n"
    )
    one_pass += "        squares += tiles[i] * tiles[i]\n    return tl.sum(squares, 1)\n\n\n"
    assert_caught(
        "layer_norm",
        CASES[case],
        fault,
        ("@triton.jit\ndef _rows_of", one_pass + "@triton.jit\ndef _rows_of"),
    )


def drawn(case: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return SPEC.inputs(CASES[case], Inputs(CASES[case], dtype))


def test_x_itself_is_returned() -> None:
    inputs = drawn("no residual")
    assert layer_norm(**inputs)[1].data_ptr() == inputs["x"].data_ptr()


def block(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y, summed = layer_norm(x, weight, bias)
    y, summed = layer_norm(y.sin(), weight, bias, summed)
    return torch.cat([y, summed])


def leaves() -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in ((3, 32), (32,), (32,))]


def test_no_gradient_of_the_residual_stream_is_added_outside() -> None:
    x, weight, bias = leaves()
    loss = block(x, weight.detach(), bias.detach()).square().sum()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loss.backward()
    assert {"aten::add", "aten::add_"}.isdisjoint(event.key for event in trace.key_averages())


def test_a_chain_of_norms_traces_whole() -> None:
    given = leaves()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    eager, traced = (
        torch.autograd.grad(function(*given).square().sum(), given)
        for function in (block, compiled)
    )
    for one, other in zip(eager, traced, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["no residual", "ragged"])
@pytest.mark.parametrize("output", [0, 1])
def test_either_output_may_go_unused(case: str, output: int) -> None:
    inputs = drawn(case)
    ours, plain = (
        function(**inputs)[output].square().sum() for function in (layer_norm, SPEC.reference())
    )
    given = list(inputs.values())
    for grad, expected in zip(
        *(torch.autograd.grad(out, given, allow_unused=True) for out in (ours, plain)), strict=True
    ):
        if grad is None:
            assert expected is None
            continue
        torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected)


def test_gradients_and_inputs_in_another_layout() -> None:
    inputs = drawn("ragged")
    across = inputs | {
        name: inputs[name].detach().mT.contiguous().mT.requires_grad_()
        for name in ("x", "residual")
    }
    results = []
    for given in (inputs, across):
        y, summed = layer_norm(**given)
        weights = torch.linspace(-1, 1, y.numel()).view(y.mT.shape).mT
        results.append(
            (y, summed, *torch.autograd.grad((y, summed), list(given.values()), (weights, weights)))
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def wrong(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    good = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(4),
        "bias": torch.zeros(4),
        "residual": torch.zeros(2, 4),
    }
    return good | changes


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (wrong(x=torch.zeros(2, 4, dtype=torch.float64)), "float64"),
        (wrong(x=torch.zeros(0, 4)), "empty shape"),
        (wrong(weight=torch.zeros(4, dtype=torch.float16)), "float16; takes one dtype"),
        (wrong(weight=torch.zeros(5)), r"shape \(5,\); takes \(4,\)"),
        (wrong(residual=torch.zeros(1, 4)), r"takes \(2, 4\) beside x"),
        (wrong(bias=torch.zeros(4, device="meta")), "one device"),
        (wrong(x=torch.zeros(())), "a last axis"),
    ],
)
def test_bad_input_is_one_sentence(inputs: dict[str, torch.Tensor], words: str) -> None:
    for function in [layer_norm, torchs] if words != "float64" else [layer_norm]:
        with pytest.raises(KernelError, match=words):
            function(**inputs)


def test_a_row_that_is_too_wide() -> None:
    with pytest.raises(KernelError, match=f"at most {WIDEST}"):
        layer_norm(torch.zeros(1, WIDEST + 1), *torch.zeros(2, WIDEST + 1))


def test_the_widest_row() -> None:
    case = Case("widest", {"B": 1, "L": 2, "C": WIDEST}, extras=Extras(residual=False))
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    torch.testing.assert_close(layer_norm(**inputs), SPEC.reference()(**inputs))
