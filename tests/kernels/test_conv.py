from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_kernels import harness
from sd_kernels.conv import SPEC
from sd_kernels.conv.aten import conv, tuned
from sd_kernels.errors import KernelError
from sd_kernels.registry import all_ops
from sd_kernels.spec import Case, Inputs
from sd_perf.config import UNetConfig
from sd_perf.reference.unet import UNet
from tests.kernels.faults import assert_caught

CASES = {case.name: case for case in SPEC.small_cases}


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def as_if_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *_: SimpleNamespace(name="Cudnn"))


@pytest.mark.parametrize("case", SPEC.small_cases, ids=lambda case: case.name)
def test_the_adapter_calls_torch_rightly(case: Case, as_if_cudnn: None) -> None:
    verdicts = harness.check(SPEC, "cudnn", case, torch.float64)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
    inputs = SPEC.inputs(case, Inputs(case, torch.float32))
    y = conv(**inputs)
    grads = torch.autograd.grad(y.sum(), (inputs["x"], inputs["weight"]))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, *grads))


@pytest.mark.parametrize(
    "fault",
    [
        ("F.conv2d(x, weight,", "F.conv2d(x, weight.mT,"),
        ("F.conv2d(x, weight", "F.conv2d(F.pad(x, (1, 0, 1, 0))[..., :-1, :-1], weight"),
    ],
    ids=["kernel transposed", "shifted by a pixel"],
)
def test_planted_faults_are_red(fault: tuple[str, str], as_if_cudnn: None) -> None:
    assert_caught("conv", CASES["ragged"], fault, backend="cudnn", dtype=torch.float64)


def test_what_is_not_cudnn_s_is_refused() -> None:
    """On a CPU, or on a GPU without cuDNN, torch would silently take another convolution."""
    if torch.cuda.is_available():
        pytest.skip("needs a CPU")
    with pytest.raises(
        KernelError, match=r"on cpu that torch would give to \w+; takes CUDA tensors"
    ):
        conv(image(1, 8, 4, 4), image(8, 8, 3, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 8, 4, 4)}, r"x of shape \(2, 8, 4, 4\) with strides .*channels-last"),
        ({"weight": torch.zeros(8, 8, 3, 3)}, r"weight of shape .*weight.to\(memory_format"),
        ({"x": image(2, 16, 4, 4)[:, :8]}, "channels-last"),
        ({"x": image(0, 8, 4, 4)}, "none of them empty"),
        ({"x": torch.zeros(2, 8)}, "four axes"),
        ({"x": image(2, 8, 4, 4, dtype=torch.int32)}, "int32"),
        ({"x": image(2, 8, 4, 4, dtype=torch.bfloat16)}, "one dtype"),
        ({"weight": image(8, 8, 3, 3).to("meta")}, "one device"),
        ({"weight": image(8, 4, 3, 3)}, "as many channels"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], words: str, as_if_cudnn: None) -> None:
    with pytest.raises(KernelError, match=words):
        conv(**{"x": image(2, 8, 4, 4), "weight": image(8, 8, 3, 3), **changes})


def test_tuning_is_on_within_and_as_before_after(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = torch.backends.cudnn
    before = flags.benchmark, flags.benchmark_limit
    with pytest.raises(RuntimeError, match="within"), tuned(algorithms=7):
        assert (flags.benchmark, flags.benchmark_limit) == (True, 7)
        raise RuntimeError("within")
    assert (flags.benchmark, flags.benchmark_limit) == before
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(KernelError, match="deterministic"), tuned():
        pass


def test_the_cases_are_the_unet_s_convolutions() -> None:
    """Torch counts the operations of one forward pass of the plain UNet.

    The plain UNet has the upsampling convolutions in their plain form.
    """
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        UNet(UNetConfig())(
            torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 1024)
        )
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]

    def flops(op: str, case: Case) -> float:
        H, W = case.shape["H"], case.shape["W"]
        merged_to_plain = 9 / 4 * H * W / ((H + 1) * (W + 1)) if op == "upsample_conv" else 1
        return (
            case.calls
            * all_ops()[op].work(case.at_batch(1), torch.bfloat16).flops
            * merged_to_plain
        )

    ours = sum(
        flops(op, case)
        for op in ("conv", "skip_conv", "upsample_conv")
        for case in all_ops()[op].cases
    )
    assert ours == pytest.approx(counted, rel=1e-12)
