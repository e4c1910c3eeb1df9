"""The kernels of a training step made of the ops of sd_kernels, from what their specs say.

The trainer does not run such a step in one CUDA graph yet. `submission` counts the ops that the
MLPerf submission has in common with it by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import bfloat16

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import Architecture, Resample, layers, res_blocks
from sd_kernels.spec import Attention, Case, Matmuls, Work
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
    yield from downsampled_skip_gradients(unet, batch)


def kernels_of(op: str, case: Case) -> Iterator[Kernel]:
    """The forward and backward kernels of a case, as the op's spec describes them."""
    spec = all_ops()[op]
    work = spec.work(case, bfloat16)
    computed = spec.matmuls(case) if spec.matmuls else None
    if isinstance(computed, Matmuls):
        yield from matmul_kernels(op, work, computed, calls=case.calls)
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
    op: str, work: Work, sizes: Matmuls, calls: int = 1, frozen_input: bool = False
) -> Iterator[Kernel]:
    """Forward, gradient of the input unless it is frozen, gradient of the weight, and the bias's.

    The two matmuls of the backward pass move half of its bytes each: both read the output's
    gradient and one more tensor, and write one.
    """
    half = work.backward_bytes / 2
    yield Kernel(op, work.forward_bytes, matmul=sizes.forward, calls=calls)
    if not frozen_input:
        yield Kernel(op, half, matmul=sizes.grad_input, calls=calls, backward=True)
    yield Kernel(op, half, matmul=sizes.grad_weight, calls=calls, backward=True)
    if sizes.bias:
        # torch sums the output's gradient over its rows in a kernel of its own.
        read = float(sizes.rows * sizes.columns * BYTES)
        yield Kernel("elementwise", read, calls=calls, backward=True)


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


def saved_activations(unet: Architecture, batch: int, concatenated: bool) -> float:
    """Bytes that the forward pass saves for the backward pass, each tensor once.

    These are what norms, matmuls and attentions read. `concatenated`: whether every skip is saved
    again, in a concatenation with the decoder's input.
    """
    total = sum(
        case.calls * spec.saved_bytes(case, bfloat16)
        for op, spec in all_ops().items()
        if spec.saved_bytes
        for case in cases(op, unet, batch)
    )
    # The skips themselves are among the sums that norms save.
    skips = sum(batch * block.side**2 * sum(block.sources[1:]) for block in res_blocks(unet))
    return float(total + (BYTES * skips if concatenated else 0))


def refusals(unet: Architecture, batch: int) -> Iterable[str]:
    """Ops that no backend but the reference takes at these sizes."""
    for op, spec in all_ops().items():
        for case in cases(op, unet, batch):
            reasons = [backend.refuses(case, bfloat16) for backend in spec.backends[:-1]]
            # An op that has the reference alone is meant to run it.
            if reasons and all(reasons):
                yield f"{op}, {case.name}: {reasons[0]}; counted as if it could"
