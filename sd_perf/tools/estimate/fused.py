"""The kernels of the fast training step, made of the ops of sd_kernels, from what their specs say.

A test compares them, op by op, with the kernels that `ledger` traces from the step itself.
`submission` counts the ops that the MLPerf submission has in common with it by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import bfloat16

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import Architecture, Resample, layers, res_blocks, transformers
from sd_kernels.spec import Attention, Case, Matmuls
from sd_perf.tools.estimate.roofline import AttentionWork, Kernel

BYTES = bfloat16.itemsize
"""of a number"""


def cases(op: str, unet: Architecture, batch: int) -> list[Case]:
    """The op's calls in a training step with `batch` samples."""
    cases_of = all_ops()[op].cases_of
    made = cases_of(unet) if cases_of else ()
    # The optimizer's buffers have no batch.
    return [case.at_batch(batch) if "B" in case.shape else case for case in made if case.calls]


def fused(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """Every op's kernels, and torch's own: sums for the gradients of biases and of skips."""
    for op in all_ops():
        for case in cases(op, unet, batch):
            yield from kernels_of(op, case)
            if op == "upsample_conv":
                yield from _around_upsample_conv(case)
    yield from downsampled_skip_gradients(unet, batch)
    yield from packed_gradients(unet, batch)
    yield from moved_gradients(unet)


def kernels_of(op: str, case: Case) -> Iterator[Kernel]:
    """The forward and backward kernels of a case, as the op's spec describes them."""
    spec = all_ops()[op]
    work = spec.work(case, bfloat16)
    computed = spec.matmuls(case) if spec.matmuls else None
    if isinstance(computed, Matmuls):
        yield from matmul_kernels(op, computed, calls=case.calls)
        return
    # Attention has a rate of its own; an op without matrices takes as long as its bytes.
    forward = backward = None
    if isinstance(computed, Attention):
        forward = AttentionWork(work.flops, computed.queries)
        backward = AttentionWork(work.backward_flops, computed.queries)
    yield Kernel(op, work.forward_bytes, attention=forward, calls=case.calls)
    if work.backward_bytes:
        yield Kernel(op, work.backward_bytes, attention=backward, calls=case.calls, backward=True)


def matmul_kernels(
    op: str, sizes: Matmuls, calls: int = 1, frozen_input: bool = False
) -> Iterator[Kernel]:
    """Forward, gradient of the input unless it is frozen, gradient of the weight, and the bias's.

    Each matmul moves input, weight and output: two of them, or their gradients, are read, and the
    third is written.
    """
    inputs = sizes.rows * sizes.stride**2 * sizes.channels
    weights = sizes.columns * sizes.taps * sizes.channels
    moved = float((inputs + weights + sizes.rows * sizes.columns) * BYTES)
    yield Kernel(op, moved, matmul=sizes.forward, calls=calls)
    if not frozen_input:
        yield Kernel(op, moved, matmul=sizes.grad_input, calls=calls, backward=True)
    yield Kernel(op, moved, matmul=sizes.grad_weight, calls=calls, backward=True)
    if sizes.bias:
        # torch sums the output's gradient over its rows in a kernel of its own.
        read = float(sizes.rows * sizes.columns * BYTES)
        yield Kernel("elementwise", read, calls=calls, backward=True)


def _around_upsample_conv(case: Case) -> Iterator[Kernel]:
    """Nine taps are merged to sixteen before the matmul, and its pixels interleaved after it."""
    B, H, W, C, K = case.sizes("B", "H", "W", "C", "K")
    # A parity has one row and one column of pixels more than it needs.
    parities, pixels = B * (H + 1) * (W + 1) * 4 * K, B * 4 * H * W * K
    for moved in (25 * K * C, parities + pixels):
        for backward in (False, True):
            size = float(moved * BYTES)
            yield Kernel("upsample_conv", size, calls=case.calls, backward=backward)


def moving(op: str, rows: int, forward: float = 0, backward: float = 0) -> Iterator[Kernel]:
    """A forward and a backward kernel that move so many 16-bit numbers a row; none for 0."""
    for numbers, is_backward in ((forward, False), (backward, True)):
        if numbers:
            yield Kernel(op, float(numbers * rows * BYTES), backward=is_backward)


def downsampled_skip_gradients(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """Sums of the gradients of the skips that a downsampling convolution reads.

    The norms on the way down and up take those of all other skips as they come.
    """
    for layer in layers(unet):
        if isinstance(layer, Resample) and not layer.up:
            yield from moving("elementwise", batch * layer.side**2, backward=3 * layer.channels)


def skip_gradients(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """Sums of the gradients of the skips where no norm takes them, as in the submission.

    A skip is read by the next layer on the way down, and on the way up by a norm and by a 1x1
    convolution. Autograd adds the three gradients in two sums, which read two and write one each.
    """
    for block in res_blocks(unet):
        for skip in block.sources[1:]:
            pixels = batch * block.side**2
            yield from moving("elementwise", pixels, backward=3 * skip)
            yield from moving("elementwise", pixels, backward=3 * skip)


def packed_gradients(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """Copies before the backward of matmuls that make several results: gradients of text and times.

    The weights of such a matmul are adjacent in training's flat buffer.
    """
    # Autograd puts the slices together that the blocks' attentions and norms give.
    texts = sum(2 * layer.channels for layer in transformers(unet))
    times = sum(block.channels for block in res_blocks(unet))
    numbers = batch * (texts * unet.context_length + times)
    yield Kernel("elementwise", 2.0 * BYTES * numbers, backward=True)


def moved_gradients(unet: Architecture) -> Iterator[Kernel]:
    """Copies of gradients from where autograd left them into the flat buffer.

    The gradients of weights that are one matmul's are written there at once.
    """
    written = 0
    for op in ("linear", "skip_conv"):
        for case in cases(op, unet, batch=1):
            computed = matmuls(case) if (matmuls := all_ops()[op].matmuls) else None
            if isinstance(computed, Matmuls):
                written += case.calls * computed.columns * computed.channels
    yield Kernel("elementwise", 2.0 * BYTES * (unet.parameters - written), backward=True)


def packed_attention_gradients(unet: Architecture, batch: int) -> Iterator[Kernel]:
    """The copy of dq, dk and dv into one gradient, after an attention that writes them apart."""
    for layer in transformers(unet):
        for rows, parts in ((layer.side**2, 3), (unet.context_length, 2)):
            yield from moving("elementwise", batch * rows, backward=2 * parts * layer.channels)


def saved_activations(unet: Architecture, batch: int) -> float:
    """Bytes that the forward pass saves for the backward pass, each tensor once.

    These are what norms, matmuls and attentions read. A skip is saved again in the concatenation
    with the decoder's input.
    """
    return sum(
        case.calls * spec.saved_bytes(case, bfloat16)
        for op, spec in all_ops().items()
        if spec.saved_bytes
        for case in cases(op, unet, batch)
    )


def refusals(unet: Architecture, batch: int) -> Iterable[str]:
    """Ops that no backend but the reference takes at these sizes."""
    for op, spec in all_ops().items():
        for case in cases(op, unet, batch):
            reasons = [backend.refuses(case, bfloat16) for backend in spec.backends[:-1]]
            # An op that has the reference alone is meant to run it.
            if reasons and all(reasons):
                yield f"{op}, {case.name}: {reasons[0]}; counted as if it could"
