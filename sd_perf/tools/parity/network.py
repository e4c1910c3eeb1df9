"""Levels block, unet and grad: the fast network against the plain one, part by part and whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_perf.fast import unet as fast
from sd_perf.fast.ops import Ops
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.reference import unet as plain
from sd_perf.tools.parity.rows import Errors, Row, compared, errors, judged
from sd_perf.tools.parity.subject import Subject, by_kind

BLOCKS = plain.ResBlock, plain.SpatialTransformer, plain.Downsample, plain.Upsample
TEXT_ENCODER = "text encoder: penultimate states"
CAPTIONS = ["a red disc above a blue square", "a photograph of an astronaut riding a horse", ""]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def compare_blocks(subject: Subject) -> Iterator[Row]:
    """Each block of the fast network, given what the plain one's block is given in float64; and the
    text encoder."""
    truth = subject.plain(torch.float64)
    given = _recorded(truth, subject.inputs())
    for dtype in subject.dtypes:
        yield from _blocks(subject, dtype, truth, given)
    if subject.where != "interpreter":
        yield from _text_encoder(subject)


def _blocks(
    subject: Subject, dtype: str, truth: nn.Module, given: dict[str, tuple[Tensor, ...]]
) -> Iterator[Row]:
    ours, torchs = subject.fast(dtype), list(subject.plain_networks(dtype))
    skips = _skip_channels(ours)
    transformers = [
        name for name, module in ours.named_modules() if isinstance(module, fast.SpatialTransformer)
    ]
    for name, args in given.items():
        rounded = [arg.to(DTYPES[dtype]) for arg in args]
        exact_block, our_block, *torch_blocks = (
            unet.get_submodule(name) for unet in (truth, ours, *torchs)
        )
        exact = exact_block(*(arg.double() for arg in rounded))
        with subject.autocast(dtype):
            by_torch = [[block(*rounded)] for block in torch_blocks]
        if (
            name in transformers
        ):  # they take keys and values, which the network projects for all of them
            rounded[1] = ours.project_text(rounded[1])[transformers.index(name)]
        by_us = _applied(our_block, rounded, skips.get(name, 0), ours.ops)
        what = f"{name} ({type(exact_block).__name__})"
        yield compared("block", what, subject.where, dtype, [by_us], by_torch, [exact])


def _recorded(
    unet: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """What every block is given, by name."""
    given: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: given.update({name: args})

    handles = [
        m.register_forward_pre_hook(keep(name))
        for name, m in unet.named_modules()
        if isinstance(m, BLOCKS)
    ]
    latents, timesteps, context = inputs
    unet(latents.double(), timesteps, context.double())
    for handle in handles:
        handle.remove()
    return given


def _skip_channels(unet: Any) -> dict[str, int]:
    """Channels that each residual block on the way up reads from a skip, by name."""
    # Each stage on the way down, from the first convolution on, leaves one; they are taken from the
    # last to the first.
    widths = [unet.input_blocks[0][0].out_channels]
    for stage in unet.input_blocks[1:]:
        first = stage[0]
        is_block = isinstance(first, fast.ResBlock)
        widths.append(first.in_layers[2].out_channels if is_block else first.op.out_channels)
    return {f"output_blocks.{number}.0": width for number, width in enumerate(reversed(widths))}


def _applied(block: Any, args: list[Tensor], skip: int, ops: Ops) -> Tensor:
    """The fast block's result (B, C, H, W)."""
    x = args[0].contiguous(memory_format=torch.channels_last)
    if isinstance(block, fast.ResBlock):
        layer = block.emb_layers[1]
        bias = (layer.bias + block.in_layers[2].bias).to(x.dtype)
        time = F.linear(F.silu(args[1]), layer.weight.to(x.dtype), bias)
        first, other = (x, None) if not skip else x.split([x.shape[1] - skip, skip], dim=1)
        return block(fast.Pending(first), other, time, ops)[0].written(ops)
    if isinstance(block, fast.SpatialTransformer):
        return block(fast.Pending(x), args[1], ops)[0].written(ops)
    if isinstance(block, fast.Downsample):
        return fast.Pending(ops.conv(x, block.op.weight, stride=2), block.op.bias).written(ops)
    return fast.Pending(ops.upsample_conv(x, block.conv.weight), block.conv.bias).written(ops)


def _text_encoder(subject: Subject) -> Iterator[Row]:
    """Penultimate states: our loop over the blocks against a hook in open_clip's own forward
    pass."""
    options = subject.config.text_encoder
    if not options.weights or not (options.weights == "random" or Path(options.weights).is_file()):
        what = (
            f"{options.weights} is not there"
            if options.weights
            else "text_encoder.weights is not set"
        )
        subject.notes.append(f"the text encoder was not compared: {what}")
        return
    encoder = OpenClipTextEncoder(options).to(subject.device)
    ours = encoder(CAPTIONS)
    by_torch, truth = (_hooked(encoder, dtype) for dtype in (torch.float32, torch.float64))
    yield compared("block", TEXT_ENCODER, subject.where, "float32", [ours], [[by_torch]], [truth])


def _hooked(encoder: OpenClipTextEncoder, dtype: torch.dtype) -> Tensor:
    tower, states = encoder.tower.to(dtype), []
    handle = tower.transformer.resblocks[-2].register_forward_hook(
        lambda module, args, out: states.append(out)
    )
    tower(encoder.tokenizer(CAPTIONS).to(tower.positional_embedding.device))
    handle.remove()
    return tower.ln_final(states[0])


def compare_networks(subject: Subject, levels: set[str]) -> Iterator[Row]:
    """Prediction (unet), and gradients of a weighted sum of it by kinds of parameters (grad)."""
    for dtype in subject.dtypes:
        yield from (
            row for row in _networks(subject, dtype, "grad" in levels) if row.level in levels
        )


def _networks(subject: Subject, dtype: str, with_grads: bool) -> Iterator[Row]:
    # One network at a time, and nothing kept but errors: the benchmark's takes 7 GB in float64,
    # gradients as much.
    exact = _results(subject, subject.plain(torch.float64), "float64", with_grads)

    def errors_of(unet: nn.Module) -> dict[str, Errors]:
        results = _results(subject, unet, dtype, with_grads)
        kinds = {
            name: [1 + number for number in numbers] for name, numbers in by_kind(unet).items()
        }
        parts = {"prediction": [0], **(kinds if with_grads else {})}
        return {
            name: errors([results[i] for i in part], [exact[i] for i in part])
            for name, part in parts.items()
        }

    by_torch, by_us = (
        [errors_of(unet) for unet in subject.plain_networks(dtype)],
        errors_of(subject.fast(dtype)),
    )
    for name, ours in by_us.items():
        level = "unet" if name == "prediction" else "grad"
        yield judged(level, name, subject.where, dtype, ours, [plain[name] for plain in by_torch])


def _results(subject: Subject, unet: nn.Module, dtype: str, with_grads: bool) -> list[Tensor]:
    """Prediction and all gradients, detached."""
    latents, timesteps, context = subject.inputs()
    if dtype == "float64":
        latents, context = latents.double(), context.double()
    with subject.autocast(dtype), torch.set_grad_enabled(with_grads):
        v = unet(latents, timesteps, context)
        # Weights that do not follow v, rounded so that they are the same numbers in every dtype.
        weights = (latents.roll(1, dims=-1) * 8).round().div(8)[:, : v.shape[1]].to(v.dtype)
        grads = (
            torch.autograd.grad((v * weights).sum(), list(unet.parameters())) if with_grads else ()
        )
    return [v.detach(), *(grad.detach() for grad in grads)]
