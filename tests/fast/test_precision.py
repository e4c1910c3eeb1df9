"""The fast UNet with linear layers in FP8, with blocks computed again in the backward pass, and
compiled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import launch
from sd_kernels.targets import GPUS, Target
from sd_perf.config import LINEAR_LAYERS, Config, KernelsConfig, PrecisionConfig, UNetConfig
from sd_perf.fast.linear import load_precision_state, precision_state
from sd_perf.fast.unet import FastUNet
from sd_perf.models.build import build_sampling_unet
from sd_perf.reference.unet import UNet
from tests.fast.test_unet import REFERENCE, built, largest_difference, randomised, results
from tests.kernels import fake_te

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=16,
    context_dim=48,
    resblock_groups=16,
    transformer_groups=16,
)
CONTEXT = (77, 48)
C, TRANSFORMERS = 64, 4
CLASSES = {
    "attention": r"attn1\.to_[qkv]|attn2\.to_q|to_out\.0",
    "feed_forward": r"ff\.net\.0\.proj|ff\.net\.2",
    "transformer_ends": r"proj_in|proj_out",
    "text": r"attn2\.to_[kv]",
}


class Straight(torch.autograd.Function):
    """Numbers rounded on the way there, gradients on the way back, each to an FP8 format with one
    scale, or to none."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, there: torch.dtype | None, back: torch.dtype | None
    ) -> torch.Tensor:
        ctx.back = back
        return nearest(x, there)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return nearest(grads[0], ctx.back), None, None


def nearest(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return x.clone()
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return ((x.double() * scale).float().to(dtype).double() / scale).to(x.dtype)


def with_roundings(unet: UNet, classes: tuple[str, ...] = LINEAR_LAYERS) -> UNet:
    """The plain UNet whose linear layers of these classes round their operands, and those of their
    gradients."""
    pattern = "|".join(CLASSES[name] for name in classes)
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and re.search(f"({pattern})$", name):
            layer.forward = partial(rounding_linear, layer)  # type: ignore[method-assign]
    return unet


def rounding_linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    x, weight = (Straight.apply(t, torch.float8_e4m3fn, None) for t in (x, layer.weight))
    y = Straight.apply(F.linear(x, weight), None, torch.float8_e5m2)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def plain_unet() -> UNet:
    """No layer at its initial zero; every branch about as large as what it is added to, so that its
    errors show."""
    unet, generator = UNet(CONFIG), torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        size = parameter[0].numel() if parameter.dim() > 1 else 25
        torch.nn.init.normal_(parameter, std=size**-0.5, generator=generator)
    return unet


def errors(unet: torch.nn.Module, side: int = 8, bf16: bool = True) -> tuple[float, float]:
    """Of the prediction, and the largest of a gradient, against the plain UNet in float64."""
    exact = results(plain_unet().double(), torch.float64, side, CONTEXT)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = results(unet, torch.float32, side, CONTEXT)
    return largest_difference(ours[:1], exact[:1]), largest_difference(ours[1:], exact[1:])


def assert_alike(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    """Errors within a factor of two of each other: no more roundings, and no fewer."""
    print("errors", ours, "of a plain UNet with the same roundings", theirs)
    for our_error, their_error in zip(ours, theirs, strict=True):
        assert their_error / 2 < our_error < 2 * their_error


def fast_unet(
    precision: PrecisionConfig, kernels: KernelsConfig = REFERENCE, **changes: Any
) -> FastUNet:
    """With the weights of `plain_unet`."""
    unet = built(replace(CONFIG, implementation="fast", **changes), kernels, precision)
    unet.load_state_dict(plain_unet().state_dict())
    return unet


@pytest.fixture
def on_h100(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's stand-in, chosen as on a GPU that has FP8; kernels must be named
    `reference`."""
    monkeypatch.setattr(Target, "here", lambda: GPUS["h100"].target)


def test_is_the_plain_one_where_nothing_is_rounded() -> None:
    """In float64 the op does not round, so that only what surrounds it can be wrong: sums, halves,
    order, widths."""
    fast = fast_unet(PrecisionConfig(linear="fp8_native")).double()
    exact = results(plain_unet().double(), torch.float64, 8, CONTEXT)
    assert largest_difference(results(fast, torch.float64, 8, CONTEXT), exact) < 1e-10


@pytest.mark.parametrize(
    "classes", [LINEAR_LAYERS, *((name,) for name in LINEAR_LAYERS)], ids="-".join
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_rounds_what_fp8_rounds(classes: tuple[str, ...], bf16: bool) -> None:
    precision = PrecisionConfig(**dict.fromkeys(classes, "fp8_native"))
    assert_alike(
        errors(fast_unet(precision), bf16=bf16),
        errors(with_roundings(plain_unet(), classes), bf16=bf16),
    )


@pytest.mark.slow
def test_runs_on_the_fp8_kernels() -> None:
    fast = fast_unet(PrecisionConfig(linear="fp8_native"), replace(REFERENCE, fp8_linear="triton"))
    before = launch.executed.copy()
    ours = errors(fast, side=4)
    # Eight layers a transformer and the text's: each rounds its input, its weights and its
    # gradient.
    layers = 8 * TRANSFORMERS + 1
    assert launch.executed["quantise_kernel"] - before["quantise_kernel"] == 3 * layers
    assert_alike(ours, errors(with_roundings(plain_unet()), side=4))


NORMED, TEXT = (3 * C, C), (2 * C * TRANSFORMERS, CONTEXT[1])
CALLS = {
    "attention": {
        (NORMED, "layer_norm"),
        ("attn2.to_q", "layer_norm"),
        ("attn1.to_out.0", "none"),
        ("attn2.to_out.0", "none"),
    },
    "feed_forward": {("ff.net.0.proj", "layer_norm"), ("ff.net.2", "geglu")},
    "transformer_ends": {("proj_in", "none"), ("proj_out", "none")},
    "text": {(TEXT, "none")},
}


@pytest.mark.parametrize(
    ("precision", "in_fp8"),
    [
        (PrecisionConfig(), ()),
        (PrecisionConfig(linear="fp8_native"), LINEAR_LAYERS),
        (
            PrecisionConfig(linear="fp8_native", attention="bf16"),
            ("feed_forward", "transformer_ends", "text"),
        ),
        *((PrecisionConfig(**{name: "fp8_native"}), (name,)) for name in LINEAR_LAYERS),
    ],
)
def test_a_key_is_for_the_layers_it_names(
    precision: PrecisionConfig, in_fp8: tuple[str, ...]
) -> None:
    unet = built(CONFIG)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    calls: dict[str, Counter] = {"linear": Counter(), "fp8_linear": Counter()}

    def recording(op: str) -> Callable:
        def call(
            x: torch.Tensor,
            weight: torch.Tensor,
            *others: Any,
            producer: str = "none",
            **options: Any,
        ) -> Any:
            name = names.get(id(weight), "")
            place = re.sub(
                r".*transformer_blocks\.0\.|.*_block.*\d\.|\.weight$", "", name
            ) or tuple(weight.shape)
            calls[op][place, producer] += 1
            options |= {"producer": producer} if op == "fp8_linear" else {}
            return getattr(unet.ops, op)(x, weight, *others, **options)

        return call

    ops = unet.ops.wrapped(lambda name, op: recording(name) if name in calls else op)
    recorded = FastUNet(unet.config, ops, precision)
    for name, parameter in recorded.named_parameters():
        names[id(parameter)] = name
    results(recorded, torch.float32, 4, CONTEXT)
    expected = set().union(*(CALLS[name] for name in in_fp8))
    assert set(calls["fp8_linear"]) == expected
    assert all(
        count == (1 if call == (TEXT, "none") else TRANSFORMERS)
        for call, count in calls["fp8_linear"].items()
    )
    elsewhere = {place for name in set(LINEAR_LAYERS) - set(in_fp8) for place, _ in CALLS[name]}
    times = {place for place, _ in calls["linear"]} - elsewhere
    assert elsewhere <= {place for place, _ in calls["linear"]} and len(times) == 3


def test_transformer_engine_rounds_what_fp8_rounds(on_h100: None) -> None:
    fast = fast_unet(PrecisionConfig(linear="fp8_te"))
    assert_alike(errors(fast), errors(with_roundings(plain_unet())))
    assert fake_te.state.depth == 0 and precision_state(fast) == {}


def delayed() -> FastUNet:
    return fast_unet(PrecisionConfig(feed_forward="fp8_te", fp8_recipe="delayed"))


def bf16_results(unet: torch.nn.Module, side: int = 4) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return results(unet, torch.float32, side, CONTEXT)


def test_parameters_stay_the_plain_ones(on_h100: None) -> None:
    plain, fast = UNet(CONFIG), delayed()
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in fast.named_parameters()
    ]
    names = {re.sub(r".*transformer_blocks", "", name) for name in precision_state(fast)}
    assert names == {".0.widen", ".0.narrow"} and len(precision_state(fast)) == 2 * TRANSFORMERS


def test_scales_are_those_of_earlier_steps(on_h100: None) -> None:
    unet = delayed()
    first, second = bf16_results(unet), bf16_results(unet)
    assert fake_te.state.updates == 2
    assert len(fake_te.state.seen) == 2 * TRANSFORMERS
    assert not torch.equal(first[0], second[0])


def test_precision_state_makes_another_unet_the_same(on_h100: None) -> None:
    unet, other = delayed(), delayed()
    bf16_results(unet)
    load_precision_state(other, precision_state(unet))
    expected = bf16_results(unet)
    assert all(map(torch.equal, bf16_results(other), expected))
    assert not torch.equal(bf16_results(delayed())[0], expected[0])


@pytest.mark.parametrize("steps", [0, 2])
def test_steps_of_a_warm_up_leave_no_trace(on_h100: None, steps: int) -> None:
    unet, other = delayed(), delayed()
    for _ in range(steps):
        bf16_results(unet), bf16_results(other)
    state = precision_state(unet)
    bf16_results(unet, side=8)
    load_precision_state(unet, state)
    assert all(map(torch.equal, bf16_results(unet), bf16_results(other)))


def test_pictures_are_drawn_without_fp8() -> None:
    """Weights that Transformer Engine trained are sampled where it is not, in the latents' own
    format."""
    model = replace(CONFIG, implementation="fast")
    config = Config(model=model, precision=PrecisionConfig(linear="fp8_te", fp8_recipe="delayed"))
    unet = build_sampling_unet(config, torch.device("cpu"))
    unet.load_state_dict(plain_unet().state_dict())
    ours, exact = (results(unet, torch.float32, 4, CONTEXT) for unet in (unet, plain_unet()))
    assert not unet.training and largest_difference(ours[:1], exact[:1]) < 1e-5


class MatmulShapes(TorchDispatchMode):
    """Records the shapes of the results of all matmuls within it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("text", ["bf16", "fp8_native"])
@pytest.mark.parametrize("trained", [False, True])
def test_frozen_text_takes_no_gradient(text: Any, trained: bool) -> None:
    unet = fast_unet(PrecisionConfig(text=text))
    context = torch.randn(1, *CONTEXT).bfloat16().requires_grad_(trained)
    with MatmulShapes() as matmuls:
        sum(keys.sum() for keys in unet.project_text(context)).backward()
    expected = {(77, TEXT[0]), (TEXT[0], 48)} | ({(77, 48)} if trained else set())
    assert Counter(matmuls.shapes) == Counter(expected)


def kept_tensors(unet: torch.nn.Module) -> tuple[list[torch.Tensor], int]:
    """Results, and how many tensors the backward pass was given."""
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return bf16_results(unet), count


@pytest.mark.parametrize("linear", ["bf16", "fp8_native"])
def test_computing_again_changes_no_bit_and_keeps_less(linear: Any) -> None:
    (kept, many), (recomputed, few) = (
        kept_tensors(fast_unet(PrecisionConfig(linear=linear), activation_checkpointing=again))
        for again in (False, True)
    )
    assert all(map(torch.equal, recomputed, kept))
    assert 0 < few < many / 5


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(1,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(
    ("linear", "again"),
    [
        pytest.param("bf16", False, id="bf16"),
        pytest.param("fp8_native", True, id="fp8-again", marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph(linear: Any, again: bool, levels: tuple[int, ...]) -> None:
    config = replace(
        CONFIG,
        channel_mult=levels,
        attention_resolutions=(),
        implementation="fast",
        activation_checkpointing=again,
    )
    unet = randomised(built(config, precision=PrecisionConfig(linear=linear)))
    names, eager = list(unet.state_dict()), bf16_results(unet)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    unet.compile(fullgraph=True, dynamic=False, backend=counter)
    assert largest_difference(bf16_results(unet), eager) < 1e-6
    assert counter.frame_count == 1 and list(unet.state_dict()) == names
