from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import harness
from sd_kernels.attention import SPEC, _make, packing
from sd_kernels.errors import KernelError
from sd_kernels.selection import choose
from sd_kernels.spec import Case, Inputs
from sd_kernels.targets import GPUS, Target
from tests.kernels.attention_fakes import FAKES, install
from tests.kernels.faults import assert_caught

SMALL = [
    *SPEC.small_cases,
    _make("one key", 1, 5, 1, 2),
    _make("far mean", 2, 24, 77, 2, mean=-2.3, std=0.5),
]
CASES = {case.name: case for case in SMALL}
ON_CPU = ["flash_sdpa", "math"]
PACKAGES = list(FAKES)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("self, 5 heads", ("** -0.5", "** -1.0")),
        ("self, 5 heads", ("attention(q, k, v,", "attention(q, v, k,")),
        ("cross, 77 keys", ("attention(q, k, v,", "attention(q, k[:, :, :-1], v[:, :, :-1],")),
        ("self, 5 heads", ("y.transpose(1, 2).flatten(2)", "y.permute(0, 2, 3, 1).flatten(2)")),
        ("self, 5 heads", ("(q, k, v, scale", "(q, k, v, is_causal=True, scale")),
    ],
    ids=["wrong scale", "k and v swapped", "last key dropped", "heads interleaved", "causal"],
)
def test_planted_faults_are_red(case: str, fault: tuple[str, str], backend: str) -> None:
    assert_caught("attention", CASES[case], fault, dtype=torch.float64, backend=backend)


@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", [case.name for case in SPEC.small_cases])
def test_low_precision_keeps_the_rule(case: str, backend: str, dtype: torch.dtype) -> None:
    verdicts = harness.check(SPEC, backend, CASES[case], dtype)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [*ON_CPU, *PACKAGES])
def test_wiring_in_float64(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(backend, monkeypatch) if backend in PACKAGES else [{}]
    verdicts = harness.check(SPEC, backend, case, torch.float64)
    assert calls
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize(
    ("backend", "case", "fault"),
    [
        ("te", "self, 5 heads", ('attn_mask_type="no_mask",', "")),
        ("te", "self, rows apart", ("first.contiguous())", "first)")),
        ("te", "cross, rows apart", ("first.contiguous(), ", "first, ")),
        ("te", "cross, rows apart", ("second.contiguous())", "second)")),
        ("fa3", "cross, 77 keys", ("flash_attn_func(q, k, v,", "flash_attn_func(q, v, k,")),
        ("fa4", "cross, 77 keys", ("dk=dk, dv=dv", "dk=dv, dv=dk")),
        ("cudnn_graph", "self, 5 heads", ("dout, *slots)", "dout, *slots[::-1])")),
        ("cudnn_graph", "self, 5 heads", ("** -0.5", "** -1.0")),
        ("cudnn_graph", "self, 5 heads", ("x.transpose(1, 2) for", "x for")),
        ("fa2", "self, 5 heads", ("first.shape[-1] ** -0.5", "first.shape[-1] ** -1.0")),
    ],
    ids=[
        "causal by default",
        "self's rows taken for dense",
        "queries' rows taken for dense",
        "context's rows taken for dense",
        "k and v swapped",
        "dk and dv swapped",
        "gradients backwards",
        "wrong scale of the graph",
        "rows taken for heads",
        "wrong scale",
    ],
)
def test_planted_faults_of_adapters_are_red(
    backend: str, case: str, fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(backend, monkeypatch)
    assert_caught("attention", CASES[case], fault, dtype=torch.float64, backend=backend)


def test_transformer_engine_is_pinned_to_cudnn_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install("te", monkeypatch)
    harness.check(SPEC, "te", CASES["cross, 77 keys"], torch.float64)
    assert calls[0] == {
        "qkv_format": "bshd",
        "mask": "no_mask",
        "attention_type": "cross",
        "fp8": False,
    }
    chosen = [os.environ[f"NVTE_{name}_ATTN"] for name in ("FLASH", "FUSED", "UNFUSED")]
    assert chosen == ["0", "1", "0"]


@pytest.mark.parametrize(
    "apart",
    [
        lambda dy: dy.unbind(2),
        lambda dy: dy.clone().unbind(2)[::-1],
        lambda dy: dy.clone().unbind(2),
    ],
)
@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 4), (1, 1, 3, 1, 8), (1, 4, 2, 3, 4)])
def test_gradients_are_taken_as_they_lie_only_where_they_lie_packed(
    shape, apart, monkeypatch
) -> None:
    install("te", monkeypatch)
    from sd_kernels.attention.te import _Unbind

    x, dy = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    grads = apart(dy)
    (dx,) = torch.autograd.grad(_Unbind.apply(x), x, grads)
    assert torch.equal(dx, torch.stack(grads, 2))
    (dx,) = torch.autograd.grad(_Unbind.apply(x), x, [grad.clone() for grad in grads])
    assert torch.equal(dx, torch.stack(grads, 2))


@pytest.mark.parametrize("backend", ["fa4", "cudnn_graph"])
@pytest.mark.parametrize("name", ["self, 5 heads", "cross, 77 keys"])
def test_registered_ops(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(backend, monkeypatch)
    inputs = SPEC.inputs(CASES[name], Inputs(CASES[name], torch.float32))
    function = SPEC.backend(backend).function("attention")
    op = getattr(torch.ops.sd_kernels, f"attention_{backend}_forward")
    torch.library.opcheck(op, packing.packed("attention", **inputs))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = (harness.evaluate(SPEC, each, inputs) for each in (function, compiled))
    assert all(torch.equal(eager[key], traced[key]) for key in eager)


class Passes(TorchDispatchMode):
    """Keeps the operators whose results are as large as the packed tensor.

    Views and empty tensors do not count.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.names = numbers, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and result.numel() == self.numbers
        if made and not func.is_view and "empty" not in func._opname:
            self.names.append(func._opname)
        return result


@pytest.mark.parametrize(
    ("backend", "self_attention", "cross_attention"),
    [
        ("flash_sdpa", ["stack"], ["stack"]),
        ("math", ["stack"], ["stack"]),
        ("fa2", [], []),
        ("fa3", [], ["stack"]),
        ("fa4", [], []),
        ("cudnn_graph", [], []),
        ("te", [], []),
    ],
)
def test_passes_over_the_packed_gradient(
    backend: str,
    self_attention: list[str],
    cross_attention: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend in PACKAGES:
        install(backend, monkeypatch)
    for case, expected in (
        (CASES["self, 5 heads"], self_attention),
        (CASES["cross, 77 keys"], cross_attention),
    ):
        inputs = SPEC.inputs(case, Inputs(case, torch.float64))
        leaf = inputs["qkv"] if inputs["kv"] is None else inputs["kv"]
        y = SPEC.backend(backend).function("attention")(**inputs)
        with Passes(leaf.numel()) as passes:
            (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert passes.names == expected
        assert grad.is_contiguous()


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_torch_takes_no_memory_for_the_gradients(kernel: str) -> None:
    """Where this fails, torch can write the packed gradient, and `aten` need not stack it."""
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward")
    assert backward.overloads() == ["default"]
    assert not any(argument.alias_info for argument in backward.default._schema.arguments)


@pytest.mark.parametrize("backend", [*ON_CPU, *PACKAGES])
@pytest.mark.parametrize("name", ["self, rows apart", "cross, rows apart"])
def test_layouts_change_nothing(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are dense, with rows apart, or transposed; gradients dense, transposed or expanded."""
    if backend in PACKAGES:
        install(backend, monkeypatch)
    function = SPEC.backend(backend).function("attention")
    inputs = SPEC.inputs(CASES[name], Inputs(CASES[name], torch.float64))

    def results(order: Any, grad: torch.Tensor) -> list[torch.Tensor]:
        tensors = {
            key: None if inputs[key] is None else order(inputs[key].detach())
            for key in ("qkv", "kv")
        }
        leaves = [value.requires_grad_() for value in tensors.values() if value is not None]
        y = function(**tensors, num_heads=inputs["num_heads"])
        return [y, *torch.autograd.grad(y, leaves, grad)]

    shape = function(**inputs).shape
    grads = [
        torch.randn(shape, dtype=torch.float64),
        torch.ones((), dtype=torch.float64).expand(shape),
    ]
    orders = [
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    for grad in (*grads, grads[0].mT.contiguous().mT):
        expected = results(torch.Tensor.contiguous, grad.contiguous())
        for order in orders:
            for got, wanted in zip(results(order, grad), expected, strict=True):
                torch.testing.assert_close(got, wanted)


QKV, Q, KV = torch.zeros(2, 3, 48), torch.zeros(2, 3, 16), torch.zeros(2, 5, 32)


@pytest.mark.parametrize(
    ("qkv", "kv", "num_heads", "words"),
    [
        (torch.zeros(6, 48), None, 2, r"\(6, 48\); takes \(B, L, channels\)"),
        (QKV.int(), None, 2, "int32"),
        (QKV[:0], None, 2, "empty shape"),
        (Q, KV[:, :0], 2, "empty shape"),
        (QKV, None, 5, "48 channels of 5 heads; takes a multiple of 3"),
        (QKV, None, 0, "48 channels of 0 heads"),
        (Q, KV, 3, "16 channels of 3 heads"),
        (Q, KV[:1], 2, r"kv of shape \(1, 5, 32\).*takes kv \(2, T, 32\)"),
        (Q, KV[..., :16], 2, r"kv of shape \(2, 5, 16\)"),
        (Q, KV.bfloat16(), 2, "float32 and torch.bfloat16; takes one dtype"),
        (Q, KV.to("meta"), 2, "one device"),
    ],
)
@pytest.mark.parametrize("backend", ["math", *PACKAGES])
def test_bad_input_is_one_sentence(
    backend: str, qkv: Any, kv: Any, num_heads: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(backend, monkeypatch) if backend in PACKAGES else []
    with pytest.raises(KernelError, match=rf"attention \({backend}\).*{words}"):
        SPEC.backend(backend).function("attention")(qkv, kv, num_heads=num_heads)
    assert not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels exist on a GPU")
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_pinned_kernel_that_cannot_run_raises(backend: str) -> None:
    words = (
        rf"attention \({backend}\): got torch.float32 queries \(2, 2, 3, 8\), keys \(2, 2, 3, 8\) "
        rf"on cpu; takes what"
    )
    with pytest.raises(KernelError, match=words):
        SPEC.backend(backend).function("attention")(QKV, num_heads=2)


def test_other_errors_of_torch_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        SPEC.backend("math").function("attention")(QKV, num_heads=2)


@pytest.mark.parametrize(
    ("target", "dtype", "backend"),
    [
        (GPUS["h100"].target, torch.bfloat16, "cudnn"),
        (GPUS["b200"].target, torch.float16, "cudnn"),
        (GPUS["h100"].target, torch.float32, "efficient"),
        (Target("cpu", "cpu"), torch.float32, "flash_sdpa"),
    ],
)
def test_what_auto_takes_where_no_package_is(
    target: Target, dtype: torch.dtype, backend: str
) -> None:
    assert choose("attention", target=target, cases=SPEC.cases, dtype=dtype).backend == backend


def test_what_auto_takes_where_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("fa3", "fa4", "cudnn_graph"):
        install(backend, monkeypatch)
    taken = {
        name: choose("attention", target=gpu.target, cases=SPEC.cases) for name, gpu in GPUS.items()
    }
    assert {name: choice.backend for name, choice in taken.items()} == {
        "a100": "cudnn_graph",
        "h100": "fa3",
        "h200": "fa3",
        "b200": "fa4",
    }
    assert taken["b200"].passed_over["fa3"] == "needs compute capability 9.x, B200 has 10.0"


def test_refusals() -> None:
    def against(backend: str, case: str, dtype: torch.dtype = torch.bfloat16) -> str:
        return str(SPEC.backend(backend).refuses(CASES[case], dtype) or "")

    assert against("cudnn", "one key") == "takes no single key"
    assert not against("flash_sdpa", "one key")
    odd = Case("odd", {**CASES["one head"].shape, "D": 36})
    assert (
        str(SPEC.backend("fa2").refuses(odd, torch.bfloat16))
        == "takes head dims that are multiples of 8 up to 256, not 36"
    )
    assert SPEC.backend("fa4").refuses(Case("wide", {**odd.shape, "D": 256}), torch.bfloat16)
    assert SPEC.backend("efficient").refuses(odd, torch.bfloat16) and not SPEC.backend(
        "efficient"
    ).refuses(odd, torch.float32)
    with pytest.raises(
        KernelError, match=r"takes torch.bfloat16 or torch.float16 on a GPU, not torch.float32"
    ):
        choose("attention", "cudnn", GPUS["h100"].target, dtype=torch.float32)


def test_a_step_has_the_known_work() -> None:
    works = [(case, SPEC.work(case, torch.bfloat16)) for case in SPEC.cases]
    assert sum(case.calls for case, _ in works) == 32
    for cross, gigaflops in ((False, 122.5), (True, 3.6)):
        total = sum(case.calls * work.flops for case, work in works if case.extras.cross == cross)
        assert total / 64e9 == pytest.approx(gigaflops, abs=0.05)
