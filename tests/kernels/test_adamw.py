from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sd_kernels import harness
from sd_kernels.adamw import SPEC, Extras
from sd_kernels.adamw.reference import adamw as reference
from sd_kernels.adamw.reference import join_master, split_master
from sd_kernels.adamw.triton import adamw, adamw_update
from sd_kernels.errors import KernelError
from sd_kernels.spec import Case, Inputs
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}
ROOT = Path(__file__).parents[2]
STATE = ("weights", "remainders", "exp_avg", "exp_avg_sq")


def inputs_of(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Any]:
    return SPEC.inputs(CASES[name], Inputs(CASES[name], dtype)) | changes


def bits(low: int, high: int, number: int) -> torch.Tensor:
    return torch.randint(
        low, high, (number,), generator=torch.Generator().manual_seed(0), dtype=torch.int64
    ).int()


def every_kind_of_master() -> torch.Tensor:
    """Random bit patterns, and upper halves at every border with lower halves near every tie."""
    upper = torch.tensor(
        [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF]
    ).repeat(2)
    upper[9:] += 0x8000
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    special = ((upper[:, None] << 16) + lower).flatten().int()
    return torch.cat((special, bits(-(2**31), 2**31, 1 << 20))).view(torch.float32)


def test_masters_are_restored_bit_for_bit() -> None:
    master = every_kind_of_master()
    weights, remainders = split_master(master)
    assert (weights.dtype, remainders.dtype) == (torch.bfloat16, torch.int16)
    nan = master.isnan()
    assert torch.equal(
        join_master(weights, remainders).view(torch.int32)[~nan], master.view(torch.int32)[~nan]
    )
    assert weights[nan].isnan().all() and join_master(weights, remainders)[nan].isnan().all()
    different = (weights.view(torch.int16) != master.to(torch.bfloat16).view(torch.int16)) & ~nan
    assert (remainders[different] == -(2**15)).all(), (
        "only ties are rounded otherwise than to nearest even"
    )


def test_any_pair_is_a_master() -> None:
    pair = (
        bits(-(2**15), 2**15, 1 << 16).short().view(torch.bfloat16),
        bits(-(2**15), 2**15, 1 << 16).short().flip(0),
    )
    master = join_master(*pair)
    again = split_master(master)
    usual = ~master.isnan()
    assert all(
        torch.equal(a.view(torch.int16)[usual], b.view(torch.int16)[usual])
        for a, b in zip(pair, again, strict=True)
    )


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ([("w * decay + update * step_size", "update * step_size")], "tiny"),
        ([("coefficients(step,", "coefficients(step + 1,")], "tiny"),
        (
            [("tl.sqrt_rn(v) * root_scale + eps", "tl.sqrt_rn(v * root_scale * root_scale + eps)")],
            "tiny",
        ),
        (
            [
                ("_to_stream(m,", "_to_stream(swapped,"),
                ("_to_stream(v,", "_to_stream(m,"),
                ("swapped", "v"),
            ],
            "tiny",
        ),
        ([("(w.to(tl.int32) << 16) + low.to(tl.int32)", "w.to(tl.int32) << 16")], "tiny"),
        ([("bits + 0x8000", "bits")], "ragged"),
        ([("bits + 0x7FFF + ((bits >> 16) & 1)", "bits")], "bfloat16 moments"),
        ([("    grads += start\n", "")], "ragged"),
        ([("tl.sqrt_rn(v)", "tl.rsqrt(v + 1e-30) * v")], "ragged"),
    ],
    ids=[
        "weight decay forgotten",
        "bias correction a step late",
        "eps inside the root",
        "moments swapped",
        "remainder dropped",
        "weights truncated",
        "moments truncated",
        "gradients of the first block everywhere",
        "inexact root",
    ],
)
def test_planted_faults_are_red(fault: list[tuple[str, str]], case: str) -> None:
    assert_caught("adamw", CASES[case], *fault, dtype=torch.bfloat16)


@pytest.mark.parametrize("function", [adamw, reference])
def test_updates_in_place_and_gives_back(function: Callable[..., Any]) -> None:
    inputs = inputs_of("tiny")
    before = {name: inputs[name].clone() for name in STATE}
    results = function(**inputs)
    assert all(result is inputs[name] for name, result in zip(SPEC.outputs, results, strict=True))
    assert not any(
        torch.equal(inputs[name], before[name]) for name in ("remainders", "exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize("function", [adamw, reference])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_seen_in_every_output(function: Callable[..., Any]) -> None:
    case = Case("", {"N": 4}, extras=Extras(exp_avg=torch.bfloat16, exp_avg_sq=torch.bfloat16))
    inputs = SPEC.inputs(case, Inputs(case, torch.bfloat16))
    for grad in (float("nan"), float("inf")):
        changed = harness.copied(inputs) | {"grads": torch.full((4,), grad).bfloat16()}
        weights, exp_avg, exp_avg_sq, _ = function(**changed)
        assert weights.isnan().all() and not torch.cat((exp_avg, exp_avg_sq)).isfinite().any()
    # A master of 0x7FFFFFFF, NVIDIA's NaN; arithmetic on a CPU keeps it.
    inputs["weights"] = torch.tensor([-(2**15)] * 4, dtype=torch.int16).view(torch.bfloat16)
    inputs["remainders"] = torch.tensor([-1] * 4, dtype=torch.int16)
    assert function(**inputs)[0].isnan().all()


def test_without_a_rate_nothing_moves() -> None:
    master = every_kind_of_master()[:5000]
    master = master[master.isfinite()].contiguous()
    weights, remainders = split_master(master)
    zeros = torch.zeros_like(master)
    grads = torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    adamw(weights, remainders, grads, zeros, zeros.clone(), torch.tensor(1), torch.tensor(0.0))
    assert torch.equal(join_master(weights, remainders), master)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_that_of_torch_adamw(
    dtype: torch.dtype, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.optim.AdamW(foreach=False, fused=False), capturable and not, in float32; twelve steps
    on from zero."""
    module = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda: ["cpu", "cuda"])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2000, generator=generator) * 0.05
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "foreach": False, "fused": False}
    truth, plain = (
        torch.nn.Parameter(start.clone().to(kind)) for kind in (torch.float64, torch.float32)
    )
    peers = [
        torch.optim.AdamW([truth], **options),
        torch.optim.AdamW([plain], **options, capturable=capturable),
    ]
    weights, remainders = split_master(start) if dtype == torch.bfloat16 else (start.clone(), None)
    exp_avg, exp_avg_sq = torch.zeros(2000), torch.zeros(2000)
    for step in range(1, 13):
        grads = (torch.randn(2000, generator=generator) * 1e-3).to(dtype)
        for parameter, peer in zip((truth, plain), peers, strict=True):
            parameter.grad = grads.to(parameter.dtype)
            peer.step()
        adamw(
            weights, remainders, grads, exp_avg, exp_avg_sq, torch.tensor(step), torch.tensor(1e-4)
        )
    ours = weights if remainders is None else join_master(weights, remainders)
    states = [(truth, plain, ours)]
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        states.append((peers[0].state[truth][name], peers[1].state[plain][name], moment))
    for right, theirs, our in states:
        for norm in (2, float("inf")):
            error, torch_error = (
                torch.linalg.vector_norm(x.double() - right, norm).item() for x in (our, theirs)
            )
            assert error <= 2 * torch_error, f"{error:.2e} against {torch_error:.2e}"


def test_kinds_of_step_gradient_and_remainder_make_no_difference() -> None:
    expected = adamw(**inputs_of("ragged"))
    inputs = inputs_of("ragged")
    spread = torch.empty(len(inputs["grads"]), 2, dtype=torch.bfloat16)[:, 0].copy_(inputs["grads"])
    for change in (
        {"step": torch.tensor([1.0])},
        {"step": torch.tensor(1), "learning_rate": inputs["learning_rate"].double()},
        {"grads": spread},
        {"remainders": inputs["remainders"].view(torch.uint16)},
    ):
        for result, right in zip(adamw(**harness.copied(inputs) | change), expected, strict=True):
            assert torch.equal(result.view(right.dtype), right), change.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": torch.zeros(5)}, "float32 weights with remainders"),
        ({"remainders": None}, "bfloat16 weights without remainders"),
        ({"remainders": torch.zeros(5)}, "remainders of torch.float32"),
        ({"grads": torch.zeros(5, dtype=torch.float16)}, "grads of torch.float16"),
        ({"grads": torch.zeros(6)}, r"grads of shape \(6,\)"),
        ({"exp_avg": torch.zeros(5, dtype=torch.float64)}, "exp_avg of torch.float64"),
        ({"exp_avg": torch.zeros(5, 1)}, "exp_avg of shape"),
        ({"exp_avg_sq": torch.zeros(10)[::2]}, "exp_avg_sq of stride 2"),
        ({"exp_avg_sq": torch.zeros(6)[1:]}, "multiples of 16 bytes"),
        ({"step": torch.zeros(2)}, "step of shape"),
        ({"learning_rate": torch.tensor(1)}, "learning_rate of torch.int64"),
        ({"grads": torch.zeros(5, device="meta")}, "cpu and meta"),
        (
            {name: torch.zeros(0, dtype=torch.bfloat16) for name in ("weights", "grads")},
            "not empty",
        ),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        adamw(**inputs_of("tiny", **changes))


def test_float32_weights_pass_opcheck() -> None:
    inputs = inputs_of("tiny", torch.float32)
    buffers = [inputs[name] for name in ("weights", "remainders", "grads", "exp_avg", "exp_avg_sq")]
    torch.library.opcheck(adamw_update, (*buffers, torch.full((3,), 0.1), 0.9, 0.999, 1e-8))


ARITHMETIC = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks.ahead_of_time import compile_for, launches_of
from sd_kernels.adamw import SPEC
launches = (launch for _, launch in launches_of(SPEC, torch.bfloat16))
launch = next(each for each in launches if each.kernel.fn.__name__ == "adamw_kernel")
_, source, options = compile_for(launch, 90)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
print(json.dumps(sorted(set(re.findall(r"\\b[a-z]\\w+(?:\\.[a-z]+)*\\.f32\\b", ptx)))))
"""


def test_compiled_arithmetic_rounds_every_operation_and_keeps_subnormals() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ARITHMETIC]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    used = {
        name
        for name in json.loads(result.stdout)
        if not name.startswith(("mov", "ld", "st", "setp", "selp"))
    }
    assert used == {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}


def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """The signature and the arithmetic of the function of this name in Apex, commit 004da4ed."""
    assert (noop_flag.dtype, step.dtype, lr.dtype, inv_scale.dtype) == (
        torch.int32,
        torch.int32,
        *[torch.float32] * 2,
    )
    (g,), (p,), (m,), (v,) = tensor_lists
    assert {tensor.dtype for tensor in (g, p, m, v)} == {
        torch.float32
    } and mode == bias_correction == 1
    g.mul_(inv_scale)
    m.mul_(beta1).add_(g * (1 - beta1))
    v.mul_(beta2).add_(g * g * (1 - beta2))
    corrected = v / (1 - beta2 ** step.double()).float()
    update = (m / (1 - beta1 ** step.double()).float()) / (
        corrected.sqrt() + epsilon
    ) + weight_decay * p
    p.sub_(lr * update)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    applier = SimpleNamespace(
        multi_tensor_applier=lambda op, noop_flag, lists, *arguments: op(
            65536, noop_flag, lists, *arguments
        )
    )
    monkeypatch.setitem(
        sys.modules,
        "amp_C",
        SimpleNamespace(multi_tensor_adam_capturable=multi_tensor_adam_capturable),
    )
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(multi_tensor_apply=applier))
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", applier)
    yield importlib.import_module("sd_kernels.adamw.apex")
    del sys.modules["sd_kernels.adamw.apex"]


@pytest.mark.parametrize("name", ["tiny", "ragged", "float32 gradients", "subnormal squares"])
def test_apex_is_called_as_it_takes(name: str, apex: ModuleType) -> None:
    verdicts = harness.check(SPEC, "apex", CASES[name], torch.float32, function=apex.adamw)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize(("backend", "module"), [("apex", "apex"), ("torch", "aten")])
def test_adapters_refuse_what_their_package_would_do_otherwise(
    backend: str, module: str, apex: ModuleType
) -> None:
    adapter = importlib.import_module(f"sd_kernels.adamw.{module}")
    for name, dtype in (
        ("tiny", torch.bfloat16),
        ("bfloat16 moments", torch.float32),
        ("float32 weights", torch.bfloat16),
    ):
        assert "float32 alone" in str(SPEC.backend(backend).refuses(CASES[name], dtype))
        with pytest.raises(KernelError, match="takes float32"):
            adapter.adamw(**inputs_of(name, dtype))


def test_work_counts_the_bytes_of_every_tensor() -> None:
    for case in SPEC.small_cases:
        for dtype in SPEC.dtypes:
            inputs = SPEC.inputs(case, Inputs(case, dtype))
            tensors = {
                name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)
            }
            moved = sum(
                value.nbytes * (2 if name in STATE else 1) for name, value in tensors.items()
            )
            assert SPEC.work(case, dtype).forward_bytes == moved
