"""Level block: each block of the fast network, and the text encoder, against the plain one.

Shape letters: B samples, C channels, H and W rows and columns, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_perf.fast import unet as fast
from sd_perf.fast.ops import Ops
from sd_perf.fast.pending import Pending
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.reference import unet as plain
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.parity_case import ParityCase
from sd_perf.tools.parity.yardsticks import plain_torch_networks

BLOCKS = plain.ResBlock, plain.SpatialTransformer, plain.Downsample, plain.Upsample
TEXT_ENCODER = "text encoder: penultimate states"
CAPTIONS = ["a red disc above a blue square", "a photograph of an astronaut riding a horse", ""]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def compare_blocks(case: ParityCase) -> Iterator[Comparison]:
    """Compare each block by itself: its inputs are those of the plain network in float64.

    So an error shows in the block that makes it, and in no other. The text encoder follows.
    """
    truth = case.plain_network(torch.float64)
    inputs = _inputs_of_blocks(truth, case.inputs())
    for dtype in case.dtypes:
        yield from _compare_at(dtype, case, truth, inputs)
    if case.where != "interpreter":
        yield from _compare_text_encoder(case)


def _compare_at(
    dtype: str, case: ParityCase, truth: nn.Module, inputs: dict[str, tuple[Tensor, ...]]
) -> Iterator[Comparison]:
    comparer = case.comparer("block", dtype)
    network, plain_networks = case.fast_network(dtype), list(plain_torch_networks(case, dtype))
    skips = _skip_channels(network)
    transformers = [
        name
        for name, block in network.named_modules()
        if isinstance(block, fast.SpatialTransformer)
    ]
    for name, args in inputs.items():
        rounded = [arg.to(DTYPES[dtype]) for arg in args]
        exact_block, fast_block, *torch_blocks = (
            unet.get_submodule(name) for unet in (truth, network, *plain_networks)
        )
        exact = exact_block(*(arg.double() for arg in rounded))
        with case.autocast(dtype):
            by_torch = [[block(*rounded)] for block in torch_blocks]
        if name in transformers:
            # The fast transformer takes keys and values, which the network projects for all blocks.
            rounded[1] = network.project_text(rounded[1])[transformers.index(name)]
        result = _apply(fast_block, rounded, skip_channels=skips.get(name, 0), ops=network.ops)
        what = f"{name} ({type(exact_block).__name__})"
        yield comparer.tensors(what, fast=[result], torch_results=by_torch, truth=[exact])


def _inputs_of_blocks(
    unet: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """The arguments of every block, by its name, in one forward pass in float64."""
    recorded: dict[str, tuple[Tensor, ...]] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args: recorded.update({name: args})

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in unet.named_modules()
        if isinstance(module, BLOCKS)
    ]
    latents, timesteps, context = inputs
    unet(latents.double(), timesteps, context.double())
    for handle in handles:
        handle.remove()
    return recorded


def _skip_channels(unet: Any) -> dict[str, int]:
    """Channels of the skip that each ResBlock on the way up takes, by the block's name."""
    # The first convolution and each stage on the way down leave a skip; the last is taken first.
    widths = [unet.input_blocks[0][0].out_channels]
    for stage in unet.input_blocks[1:]:
        first = stage[0]
        is_block = isinstance(first, fast.ResBlock)
        widths.append(first.in_layers[2].out_channels if is_block else first.op.out_channels)
    return {f"output_blocks.{index}.0": width for index, width in enumerate(reversed(widths))}


def _apply(block: Any, args: list[Tensor], *, skip_channels: int, ops: Ops) -> Tensor:
    """The fast block's result (B, C, H, W) for what the plain block takes.

    Plain blocks take the concatenation of input and skip, and the time before its projection.
    """
    x = args[0].contiguous(memory_format=torch.channels_last)
    if isinstance(block, fast.ResBlock):
        layer = block.emb_layers[1]
        bias = (layer.bias + block.in_layers[2].bias).to(x.dtype)
        time = F.linear(F.silu(args[1]), layer.weight.to(x.dtype), bias)
        skip = None
        if skip_channels:
            x, skip = x.split([x.shape[1] - skip_channels, skip_channels], dim=1)
        left = block.out_layers[3].bias
        if isinstance(block.skip_connection, torch.nn.Conv2d):
            left = left + block.skip_connection.bias
        return block(Pending(x), skip, time, left, ops)[0].written(ops)
    if isinstance(block, fast.SpatialTransformer):
        return block(Pending(x), args[1], ops)[0].written(ops)
    if isinstance(block, fast.Downsample):
        return Pending(ops.conv(x, block.op.weight, stride=2), block.op.bias).written(ops)
    return Pending(ops.upsample_conv(x, block.conv.weight), block.conv.bias).written(ops)


def _compare_text_encoder(case: ParityCase) -> Iterator[Comparison]:
    """Penultimate states: our loop over the blocks against a hook in open_clip's own forward."""
    options = case.config.text_encoder
    if not options.weights or not (options.weights == "random" or Path(options.weights).is_file()):
        what = (
            f"{options.weights} is not there"
            if options.weights
            else "text_encoder.weights is not set"
        )
        case.notes.append(f"the text encoder was not compared: {what}")
        return
    encoder = OpenClipTextEncoder(options).to(case.device)
    states = encoder(CAPTIONS)
    # In this order: the encoder stays in float64.
    by_open_clip, truth = (_open_clip_states(encoder, d) for d in (torch.float32, torch.float64))
    yield case.comparer("block", "float32").tensors(
        TEXT_ENCODER, fast=[states], torch_results=[[by_open_clip]], truth=[truth]
    )


def _open_clip_states(encoder: OpenClipTextEncoder, dtype: torch.dtype) -> Tensor:
    """States (captions, T, C) that the last block but one gives, after the final norm.

    Casts the encoder in place.
    """
    tower, states = encoder.tower.to(dtype), []
    handle = tower.transformer.resblocks[-2].register_forward_hook(
        lambda module, args, out: states.append(out)
    )
    tower(encoder.tokenizer(CAPTIONS).to(tower.positional_embedding.device))
    handle.remove()
    return tower.ln_final(states[0])
