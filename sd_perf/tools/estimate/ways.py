"""Two ways to make a training step of few kernels: the best MLPerf submission's, and the ops of
sd_kernels.

The submission (NVIDIA, rounds v4.1 and v5.0; logs and code in mlcommons/training_results_v4.1 and
_v5.0): 16-bit weights, channels-last, Apex's GroupNorm with SiLU, cuDNN attention, what torch's
Inductor makes of the rest, one CUDA graph, distributed fused AdamW. Its matrix products are the
same but that queries, keys, values, and every text and time projection are products of their own,
and that upsampling writes the large image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import bfloat16

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import Architecture, ResBlock, Transformer, layers, res_blocks
from sd_kernels.spec import Case, Work
from sd_perf.tools.estimate.kernels import Kernel, Product

BYTES = 2
"""of a number in 16 bits"""


def cases(op: str, unet: Architecture, batch: int) -> list[Case]:
    """The op's calls in a step with so many samples."""
    cases_of = all_ops()[op].cases_of
    made = cases_of(unet) if cases_of else ()
    return [case.at_batch(batch) if "B" in case.shape else case for case in made if case.calls]


def fused(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """What the specs of sd_kernels say, and torch's sums: gradients of linears' biases, and of
    skips."""
    for op in all_ops():
        for case in cases(op, unet, batch):
            yield from of_case(op, case)
    yield from _skip_gradients(unet, batch)


def submission(unet: Architecture, batch: int, ranks: int) -> Iterator[Kernel]:
    """The optimizer's state is divided among `ranks` GPUs; their communication is not counted."""
    for op in ("attention", "conv", "skip_conv", "diffusion_inputs", "v_mse_loss"):
        for case in cases(op, unet, batch):
            yield from of_case(op, case)
    for layer in layers(unet):
        yield from _submitted(layer, unet, batch)
    for width in (unet.stem, 4 * unet.stem):
        yield from _linear(batch, width, 4 * unet.stem)
    yield from _norm(batch * unet.side**2, unet.widths[0], unet.side)
    yield from _skip_gradients(unet, batch)
    # Unscaling reads and writes gradients, zeroing writes them; masters and moments in float32,
    # 16-bit weights written.
    yield Kernel("adamw", unet.parameters * 6.0)
    yield Kernel("adamw", unet.parameters * 28.0 / ranks)


def of_case(op: str, case: Case) -> Iterator[Kernel]:
    """What the op's spec says of such calls, and torch's sum over rows that is the gradient of a
    linear's bias."""
    spec = all_ops()[op]
    work = spec.work(case, bfloat16)
    if op == "attention":
        forward, backward = (
            (flops, case.shape["L"]) for flops in (work.flops, work.backward_flops)
        )
        yield Kernel(op, work.forward_bytes, attention=forward, calls=case.calls)
        yield Kernel(op, work.backward_bytes, attention=backward, calls=case.calls, backward=True)
    elif op in _PRODUCTS:
        stride = {"stride": case.options["stride"]} if op == "conv" else {}
        yield from _products(op, work, case.calls, *_PRODUCTS[op](*case.shape.values(), **stride))
        if case.data.get("bias"):
            size = case.shape["B"] * case.shape["L"] * case.shape["N"] * BYTES
            yield Kernel("elementwise", float(size), calls=case.calls, backward=True)
    else:
        yield Kernel(op, work.forward_bytes, calls=case.calls)
        if work.backward_bytes:
            yield Kernel(op, work.backward_bytes, calls=case.calls, backward=True)


def _convolved(B: int, C: int, H: int, W: int, columns: int, stride: int) -> tuple[int, ...]:
    return B * -(-H // stride) * -(-W // stride), columns, C, 9, stride**2


_PRODUCTS: dict[str, Callable[..., tuple[int, ...]]] = {
    "linear": lambda B, L, channels, columns: (B * L, columns, channels),
    "conv": _convolved,
    "skip_conv": lambda B, H, W, C1, C2, columns: (B * H * W, columns, C1 + C2),
    "upsample_conv": lambda B, C, H, W, columns: (B * (H + 1) * (W + 1), 4 * columns, C, 4),
}
"""of an op's sizes: rows and columns of the output, channels of the input, taps of the filter,
stride squared"""


def _products(
    op: str,
    work: Work,
    calls: int,
    rows: int,
    columns: int,
    channels: int,
    taps: int = 1,
    stride: int = 1,
) -> Iterator[Kernel]:
    """Forward, gradient of the input, gradient of the weight."""
    yield Kernel(op, work.forward_bytes, Product(rows, columns, taps * channels), calls=calls)
    half = work.backward_bytes / 2
    yield Kernel(
        op,
        half,
        Product(rows * stride, channels, taps * columns // stride),
        calls=calls,
        backward=True,
    )
    yield Kernel(op, half, Product(columns, taps * channels, rows), calls=calls, backward=True)


def _skip_gradients(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """A skip's gradients come from the next layer, and from norm and 1x1 convolution on the way up:
    two sums each."""
    for block in res_blocks(unet):
        for _ in (*block.sources[1:], *block.sources[1:]):
            yield from _moved("elementwise", batch * block.side**2, 0, 3 * block.sources[1])


def _moved(op: str, rows: int, forward: float, backward: float) -> Iterator[Kernel]:
    """One kernel each way; numbers of 16 bits that it reads or writes in a row."""
    for numbers, is_backward in ((forward, False), (backward, True)):
        if numbers:
            yield Kernel(op, float(numbers * rows * BYTES), backward=is_backward)


def _linear(
    rows: int, channels: int, columns: int, bias: bool = True, frozen: bool = False
) -> Iterator[Kernel]:
    """The bias's gradient reads that of the output once more. A frozen input takes no gradient."""
    size = float(rows * (channels + columns) + channels * columns) * BYTES
    made = list(_products("linear", Work(0.0, size, 2 * size), 1, rows, columns, channels))
    yield from [made[0], made[2]] if frozen else made
    yield from _moved("elementwise", rows, 0, columns * bias)


def _norm(rows: int, channels: int, side: int) -> Iterator[Kernel]:
    """Apex reads an image twice where it has more than 1024 pixels."""
    twice = side**2 > 1024
    yield from _moved("group_norm", rows, (2 + twice) * channels, (3 + 2 * twice) * channels)


def _submitted(layer: Any, unet: Architecture, batch: int) -> Iterator[Kernel]:
    rows, C = batch * layer.side**2, layer.channels
    if isinstance(layer, ResBlock):
        inputs = sum(layer.sources)
        yield from _moved(
            "elementwise", rows, 2 * inputs if len(layer.sources) > 1 else 0, 3 * inputs
        )
        yield from _norm(rows, inputs, layer.side)
        yield from _linear(batch, 4 * unet.stem, C)
        # Inductor takes a convolution's bias out of it and adds it with what follows.
        yield from _moved("elementwise", rows, 2 * C, C)
        yield from _norm(rows, C, layer.side)
        yield from _moved("elementwise", rows, 3 * C, C)
    elif isinstance(layer, Transformer):
        yield from _transformer(rows, C, batch, unet)
        yield from _norm(rows, C, layer.side)
    elif layer.up:
        large = 2 * layer.side
        yield from of_case(
            "conv", Case("", {"B": batch, "C": C, "H": large, "W": large, "K": C}, {"stride": 1})
        )
        yield from _moved("elementwise", 4 * rows, 1.25 * C + 2 * C, 1.25 * C + C)
    else:
        yield from _moved("elementwise", rows // 4, 2 * C, C)


def _transformer(rows: int, C: int, batch: int, unet: Architecture) -> Iterator[Kernel]:
    for bias in (
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ):  # in, out, two attentions' out, q k v, cross q
        yield from _linear(rows, C, C, bias)
    for _ in range(2):
        yield from _linear(
            batch * unet.context_length, unet.context_width, C, bias=False, frozen=True
        )
    yield from _linear(rows, C, 8 * C)
    yield from _linear(rows, 4 * C, C)
    yield from _moved("geglu", rows, 12 * C, 20 * C)
    # In backward, weights' gradients read everything again; the first norm's gradient comes in
    # three parts, the others are of a sum that is handed on.
    for forward, backward in ((2, 10), (4, 6), (4, 6)):
        yield from _moved("layer_norm", rows, forward * C, backward * C)
    for backward in (0, 3):  # the feed-forward's sum, which needs none, and the transformer's
        yield from _moved("elementwise", rows, 3 * C, backward * C)


def kept(unet: Architecture, batch: int, concatenated: bool) -> float:
    """Bytes that forward keeps for backward: what norms, products and attentions read, each tensor
    once."""
    numbers = sum(
        case.calls * size(*case.shape.values())
        for op, size in _KEPT.items()
        for case in cases(op, unet, batch)
    )
    skips = sum(batch * block.side**2 * sum(block.sources[1:]) for block in res_blocks(unet))
    return float(BYTES * (numbers + skips * concatenated))


_KEPT: dict[str, Callable[..., int]] = {
    "group_norm": lambda B, H, W, C1, C2: (
        B * H * W * (2 * C1 + C2)
    ),  # itself, and the sum that it is of
    "layer_norm": lambda B, L, C: 2 * B * L * C,
    "geglu": lambda B, L, N: 3 * B * L * N,
    "residual_add": lambda B, S, C: B * S**2 * C,
    "attention": lambda B, L, T, H, D: (
        2 * B * H * (D * (L + T) + L)
    ),  # and a float32 for each row of scores
}


def refusals(unet: Architecture, batch: int) -> Iterable[str]:
    """Ops that no backend but the reference takes at these sizes."""
    for op, spec in all_ops().items():
        for case in cases(op, unet, batch):
            reasons = [backend.refuses(case, bfloat16) for backend in spec.backends[:-1]]
            if reasons and all(reasons):
                yield f"{op}, {case.name}: {reasons[0]}; counted as if it could"
