"""The kernels of the best MLPerf submission's training step.

It is NVIDIA's, of rounds v4.1 and v5.0 (mlcommons/training_results_v4.1 and _v5.0): 16-bit weights,
channels-last, Apex's GroupNorm with SiLU, cuDNN attention, torch's Inductor for the rest, one CUDA
graph, distributed fused AdamW. Its matmuls are those of our ops, with two differences: queries,
keys, values and every text and time projection are separate, and upsampling writes the large image.
"""

from __future__ import annotations

from collections.abc import Iterator

from sd_kernels.sd_v2_shapes import Architecture, Resample, ResBlock, Transformer, layers
from sd_kernels.spec import Case, Matmuls
from sd_perf.tools.estimate.fused import (
    cases,
    kernels_of,
    matmul_kernels,
    moving,
    skip_gradients,
)
from sd_perf.tools.estimate.roofline import Kernel

_SHARED = ("attention", "conv", "skip_conv", "diffusion_inputs", "v_mse_loss")
"""ops of sd_kernels that the submission calls in the same way"""
_APEX_PIXELS = 1024
"""pixels of the largest image that Apex's GroupNorm keeps on chip between statistics and result"""


def submission(unet: Architecture, batch: int, ranks: int) -> Iterator[Kernel]:
    """All kernels of a step but communication; `ranks` GPUs share the optimizer's state."""
    for op in _SHARED:
        for case in cases(op, unet, batch):
            yield from kernels_of(op, case)
    for layer in layers(unet):
        if isinstance(layer, ResBlock):
            yield from _res_block(layer, unet, batch)
        elif isinstance(layer, Transformer):
            yield from _transformer(layer, unet, batch)
        else:
            yield from _resample(layer, batch)
    # The time embedding, and the norm before the last convolution.
    for width in (unet.stem, 4 * unet.stem):
        yield from _linear(batch, width, 4 * unet.stem)
    yield from _group_norm(batch, unet.side, unet.widths[0])
    yield from skip_gradients(unet, batch)
    # Unscaling reads and writes the 16-bit gradients, zeroing writes them: 6 bytes a parameter.
    yield Kernel("adamw", unet.parameters * 6.0)
    # Master and both moments are float32, read and written (24); the 16-bit gradient is read and
    # the 16-bit weight written (4).
    yield Kernel("adamw", unet.parameters * 28.0 / ranks)


def _linear(
    rows: int, channels: int, columns: int, bias: bool = True, frozen_input: bool = False
) -> Iterator[Kernel]:
    """A linear layer with its bias in the matmul's epilogue. A frozen input has no gradient."""
    sizes = Matmuls(rows=rows, columns=columns, channels=channels, bias=bias)
    yield from matmul_kernels("linear", sizes, frozen_input=frozen_input)


def _group_norm(batch: int, side: int, channels: int) -> Iterator[Kernel]:
    """Apex's GroupNorm: it reads an image twice where that is too large to keep on chip."""
    readings = 2 if side**2 > _APEX_PIXELS else 1
    yield from moving(
        "group_norm",
        batch * side**2,
        forward=(readings + 1) * channels,  # and writes the result
        backward=(2 * readings + 1) * channels,  # reads input and gradient, writes a gradient
    )


def _res_block(block: ResBlock, unet: Architecture, batch: int) -> Iterator[Kernel]:
    rows, C, inputs = batch * block.side**2, block.channels, sum(block.sources)
    # Two sources are copied into one image. Backward adds the gradients of the norm and of the
    # shortcut, which both read it: two readings and a writing.
    is_concatenated = len(block.sources) > 1
    yield from moving(
        "elementwise", rows, forward=2 * inputs if is_concatenated else 0, backward=3 * inputs
    )
    yield from _group_norm(batch, block.side, inputs)
    yield from _linear(batch, 4 * unet.stem, C)
    # Inductor takes a convolution's bias out of it and adds it with what follows, here the time.
    yield from moving("elementwise", rows, forward=2 * C, backward=C)
    yield from _group_norm(batch, block.side, C)
    # ... and here the residual, which is read, too.
    yield from moving("elementwise", rows, forward=3 * C, backward=C)


def _transformer(layer: Transformer, unet: Architecture, batch: int) -> Iterator[Kernel]:
    rows, C = batch * layer.side**2, layer.channels
    # Entrance, exit and both attentions' output layers have a bias; q, k, v and the cross q none.
    for bias in [True] * 4 + [False] * 4:
        yield from _linear(rows, C, C, bias=bias)
    for _ in ("keys", "values"):
        texts = batch * unet.context_length
        yield from _linear(texts, unet.context_width, C, bias=False, frozen_input=True)
    yield from _linear(rows, C, 8 * C)
    yield from _linear(rows, 4 * C, C)
    # GEGLU: 8C in, 4C out; backward reads both again and writes 8C.
    yield from moving("geglu", rows, forward=12 * C, backward=20 * C)
    # In backward, the gradients of the norm's weights read everything again. The gradient of the
    # first norm arrives in three parts; the others also get that of the sum that they return.
    for forward, backward in ((2, 10), (4, 6), (4, 6)):
        yield from moving("layer_norm", rows, forward=forward * C, backward=backward * C)
    # The feed-forward's sum, whose gradient is the same for both, and the transformer's.
    for backward in (0, 3):
        yield from moving("elementwise", rows, forward=3 * C, backward=backward * C)
    yield from _group_norm(batch, layer.side, C)


def _resample(layer: Resample, batch: int) -> Iterator[Kernel]:
    C = layer.channels
    if not layer.up:
        # The convolution is counted with the others; its bias is added to the small image.
        yield from moving("elementwise", batch * layer.side**2 // 4, forward=2 * C, backward=C)
        return
    side = 2 * layer.side
    shape = {"B": batch, "C": C, "H": side, "W": side, "K": C}
    yield from kernels_of("conv", Case("upsampled", shape, {"stride": 1}))
    # Enlarging reads a quarter and writes the whole; the bias reads and writes the whole. Backward
    # reads the whole and writes a quarter, and reads the whole for the bias.
    enlarging = 1.25 * C
    yield from moving(
        "elementwise", batch * side**2, forward=enlarging + 2 * C, backward=enlarging + C
    )
