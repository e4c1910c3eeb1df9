"""The UNet of Stable Diffusion v2 from fused operators: what `reference.unet` computes, in fewer
passes over memory.

Everything is channels-last. A sum is not written where it arises: a convolution's bias, the time's
shift and the residual wait in a `Pending` for the norm that reads them, which hands the sum on to
the skips. Queries, keys and values come from one product; keys and values of the text for all
transformers from one, once per step; the times of all residual blocks from one. Concatenations are
read from their two sources, upsampling is part of its convolution. In which numbers a linear layer
multiplies, and whether its norm or GEGLU is part of it, is `products`' to say.

Parameters have the names, shapes and order of `reference.unet`, so that weights, optimizer state
and checkpoints pass between the two as they are; packed weights are put together in each step, a
two-thousandth of its time.

Shape letters: B batch, C channels, H and W rows and columns, L tokens, T tokens of text, E channels
of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd_kernels.selection import Choice
from sd_perf.config import PrecisionConfig, UNetConfig
from sd_perf.fast.linear import Products
from sd_perf.reference.unet import MAX_PERIOD, zeroed

Op = Callable


@dataclass(frozen=True)
class Ops:
    """The operators that the network is made of, each with the backend that was chosen for it."""

    group_norm: Op
    layer_norm: Op
    geglu: Op
    residual_add: Op
    attention: Op
    linear: Op
    fp8_linear: Op
    conv: Op
    skip_conv: Op
    upsample_conv: Op

    @classmethod
    def chosen(cls, choices: Mapping[str, Choice]) -> Ops:
        """The functions of these choices, which see weights in the dtype of what they are applied
        to.

        Up-sampling convolutions see them as they are, to round them once, after they are merged.
        """
        functions = {field.name: choices[field.name].function() for field in fields(cls)}
        cast = {
            name: _in_dtype_of_first(op)
            for name, op in functions.items()
            if name != "upsample_conv"
        }
        return cls(**{**functions, **cast})


def _in_dtype_of_first(op: Op) -> Op:
    def call(x: Tensor, *others: Tensor | None, **options: Any) -> Any:
        return op(
            x, *(other if other is None else other.to(x.dtype) for other in others), **options
        )

    return call


@dataclass(frozen=True)
class Pending:
    """The sum x (B, C, H, W) + bias (C,) + residual (B, C, H, W), not yet written."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def shift(self) -> Tensor | None:
        """The bias for each sample (B, C), as a norm takes it; no memory of its own."""
        return None if self.bias is None else self.bias.expand(len(self.x), -1)

    def written(self, ops: Ops) -> Tensor:
        """The sum, where no norm follows."""
        if self.residual is None:
            return (
                self.x if self.bias is None else self.x + self.bias[:, None, None].to(self.x.dtype)
            )
        return ops.residual_add(self.x, self.residual, self.bias)


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory as (B, H*W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) as (B, C, H, W) in channels-last memory, without a copy."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Norm(nn.Module):
    """Group normalisation of a pending sum, perhaps beside a second source."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.num_groups, self.eps, self.silu = groups, eps, silu

    def apply_to(
        self,
        ops: Ops,
        x: Tensor,
        shift: Tensor | None,
        residual: Tensor | None,
        other: Tensor | None,
        hand_on: bool,
    ) -> Any:
        """The norm (B, C, H, W) alone, or with the sum."""
        options = {
            "num_groups": self.num_groups,
            "eps": self.eps,
            "silu": self.silu,
            "return_sum": hand_on,
        }
        return ops.group_norm(x, self.weight, self.bias, shift, residual, other, **options)

    def forward(
        self, pending: Pending, ops: Ops, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm, and the sum (B, C, H, W) that it is of."""
        if pending.bias is None and pending.residual is None:
            return self.apply_to(ops, pending.x, None, None, other, False), pending.x
        return self.apply_to(ops, pending.x, pending.shift, pending.residual, other, True)


class ResBlock(nn.Module):
    """Two convolutions around which the input is carried; (pending, other) to (pending, sum of the
    input)."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers: Any = nn.Sequential(
            Norm(groups, channels, 1e-5, silu=True), nn.Identity(), conv
        )
        self.emb_layers: Any = nn.Sequential(nn.Identity(), nn.Linear(emb_channels, out_channels))
        last = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        norm = Norm(groups, out_channels, 1e-5, silu=True)
        self.out_layers: Any = nn.Sequential(norm, nn.Identity(), nn.Identity(), last)
        same = channels == out_channels
        self.skip_connection: Any = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(
        self, pending: Pending, other: Tensor | None, time: Tensor, ops: Ops
    ) -> tuple[Pending, Tensor]:
        """time (B, C') is the projected time with the first convolution's bias."""
        normal, total = self.in_layers[0](pending, ops, other)
        h = ops.conv(normal, self.in_layers[2].weight)
        h = ops.conv(
            self.out_layers[0].apply_to(ops, h, time, None, None, False), self.out_layers[3].weight
        )
        bias, skip = self.out_layers[3].bias, total
        if isinstance(self.skip_connection, nn.Conv2d):
            bias = bias + self.skip_connection.bias
            skip = ops.skip_conv(total, self.skip_connection.weight, other)
        elif other is not None:
            skip = torch.cat((total, other), dim=1)
        return Pending(h, bias, skip), total


class Attention(nn.Module):
    """Parameters of an attention, in LDM's layout."""

    def __init__(self, channels: int, context_channels: int, products: Products) -> None:
        super().__init__()
        self.product = products("attention", channels, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out: Any = nn.Sequential(nn.Linear(channels, channels))

    def out(self, attended: Tensor) -> Tensor:
        return self.product.linear(attended, self.to_out[0].weight, self.to_out[0].bias)


class TransformerBlock(nn.Module):
    """tokens (B, L, C), keys and values of the text (B, T, 2C) -> (B, L, C)."""

    def __init__(
        self, channels: int, context_dim: int, head_channels: int, products: Products
    ) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.attn1 = Attention(channels, channels, products)
        gated: Any = nn.Module()
        gated.proj = nn.Linear(channels, 8 * channels)
        self.ff: Any = nn.Module()
        self.ff.net = nn.Sequential(gated, nn.Identity(), nn.Linear(4 * channels, channels))
        self.attn2 = Attention(channels, context_dim, products)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels, eps=1e-5) for _ in range(3))
        self.qkv = products("attention", channels, 3 * channels, bias=False)
        self.query = products("attention", channels, channels, bias=False)
        self.widen = products("feed_forward", channels, 8 * channels)
        self.narrow = products("feed_forward", 4 * channels, channels)

    def forward(self, tokens: Tensor, text: Tensor, ops: Ops) -> Tensor:
        packed = torch.cat([self.attn1.to_q.weight, self.attn1.to_k.weight, self.attn1.to_v.weight])
        h, tokens = self.qkv.after_norm(tokens, None, self.norm1, packed)
        h = self.attn1.out(ops.attention(h, num_heads=self.num_heads))
        h, tokens = self.query.after_norm(h, tokens, self.norm2, self.attn2.to_q.weight)
        h = self.attn2.out(ops.attention(h, text, num_heads=self.num_heads))
        into, out = self.ff.net[0].proj, self.ff.net[2]
        h, tokens = self.widen.after_norm(h, tokens, self.norm3, into.weight, into.bias)
        return ops.residual_add(self.narrow.after_geglu(h, out.weight, out.bias), tokens)


class SpatialTransformer(nn.Module):
    """A transformer over the pixels; (pending, text) to (pending, sum of the input)."""

    def __init__(
        self, channels: int, context_dim: int, head_channels: int, groups: int, products: Products
    ) -> None:
        super().__init__()
        self.norm = Norm(groups, channels, 1e-6, silu=False)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, head_channels, products)]
        )
        self.proj_out = zeroed(nn.Linear(channels, channels))
        self.entrance, self.exit = (
            products("transformer_ends", channels, channels) for _ in range(2)
        )

    def forward(self, pending: Pending, text: Tensor, ops: Ops) -> tuple[Pending, Tensor]:
        normal, total = self.norm(pending, ops)
        tokens = self.entrance.linear(as_tokens(normal), self.proj_in.weight, self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, text, ops)
        out = self.exit.linear(tokens, self.proj_out.weight, self.proj_out.bias)
        return Pending(as_image(out, total), residual=total), total


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)


class FastUNet(nn.Module):
    """The denoiser; see `reference.unet.UNet`, whose parameters and results it shares."""

    def __init__(
        self, config: UNetConfig, ops: Ops, precision: PrecisionConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.products = products = Products(ops, precision or PrecisionConfig())
        model, E = config.model_channels, 4 * config.model_channels
        widths = [mult * model for mult in config.channel_mult]

        def layers(channels: int, level: int) -> list[nn.Module]:
            block = ResBlock(channels, widths[level], E, config.resblock_groups)
            return [
                block,
                *([transformer(widths[level])] if 2**level in config.attention_resolutions else []),
            ]

        def transformer(channels: int) -> nn.Module:
            sizes = config.context_dim, config.num_head_channels, config.transformer_groups
            return SpatialTransformer(channels, *sizes, products)

        self.time_embed: Any = nn.Sequential(nn.Linear(model, E), nn.SiLU(), nn.Linear(E, E))
        channels, skips = model, [model]
        self.input_blocks: Any = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(config.in_channels, model, 3, padding=1)])]
        )
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(layers(channels, level)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        # One after the other: initial weights are drawn in the plain one's order.
        self.middle_block: Any = nn.ModuleList(
            [ResBlock(channels, channels, E, config.resblock_groups)]
        )
        self.middle_block.append(transformer(channels))
        self.middle_block.append(ResBlock(channels, channels, E, config.resblock_groups))
        self.output_blocks: Any = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(config.num_res_blocks + 1):
                ends = [Upsample(width)] if block == config.num_res_blocks and level > 0 else []
                self.output_blocks.append(
                    nn.ModuleList([*layers(channels + skips.pop(), level), *ends])
                )
                channels = width
        norm = Norm(config.resblock_groups, channels, 1e-5, silu=True)
        last = zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        self.out: Any = nn.Sequential(norm, nn.Identity(), last)
        self.text = products("text", config.context_dim, sum(self._text_widths()), bias=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _text_attentions(self) -> list[Attention]:
        return [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]

    def _text_widths(self) -> list[int]:
        return [2 * attention.to_k.out_features for attention in self._text_attentions()]

    def project_text(self, context: Tensor) -> list[Tensor]:
        """Keys and values (B, T, 2C) of context (B, T, D) for each transformer block, in one
        product."""
        weights = [
            layer.weight
            for attention in self._text_attentions()
            for layer in (attention.to_k, attention.to_v)
        ]
        return list(
            self.text.linear(context, torch.cat(weights)).split(self._text_widths(), dim=-1)
        )

    def project_time(self, timesteps: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The shift (B, C') of each residual block's second norm: its projected time and its
        convolution's bias."""
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        layers = [block.emb_layers[1] for block in blocks]
        weight = torch.cat([layer.weight for layer in layers])
        # Added before they are put together: the gradients of two sums of slices would share their
        # memory.
        bias = torch.cat([block.emb_layers[1].bias + block.in_layers[2].bias for block in blocks])
        half = self.config.model_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        features = torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
        into, out = self.time_embed[0], self.time_embed[2]
        hidden = F.silu(self.ops.linear(features, into.weight, into.bias))
        embedding = F.silu(self.ops.linear(hidden, out.weight, out.bias))
        return list(
            self.ops.linear(embedding, weight, bias).split(
                [layer.out_features for layer in layers], dim=-1
            )
        )

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        """Predicts v (B, 4, H, W) from noisy latents (B, 4, H, W), timesteps (B,) int64 and context
        (B, T, D).

        Instead of the context it takes what `project_text` made of it, once for all steps of a
        sampler. Computes in autocast's dtype where that is on, else in that of the latents;
        statistics are float32 anyway.
        """
        device = latents.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else latents.dtype
        with torch.autocast(device, enabled=False), self.products.step():
            projected = (
                context if isinstance(context, list) else self.project_text(context.to(dtype))
            )
            return self._predict(
                latents.to(dtype), timesteps, [text.to(dtype) for text in projected]
            )

    def _predict(self, latents: Tensor, timesteps: Tensor, projected: list[Tensor]) -> Tensor:
        ops = self.ops
        times, texts = iter(self.project_time(timesteps, latents.dtype)), iter(projected)
        first = self.input_blocks[0][0]
        latents = latents.contiguous(memory_format=torch.channels_last)
        pending, skips = Pending(ops.conv(latents, first.weight), first.bias), []
        for stage in [*self.input_blocks[1:], self.middle_block]:
            for place, layer in enumerate(stage):
                if isinstance(layer, Downsample):
                    total = pending.written(ops)
                    pending = Pending(ops.conv(total, layer.op.weight, stride=2), layer.op.bias)
                else:
                    pending, total = self._layer(layer, pending, None, times, texts)
                if place == 0:
                    skips.append(total)
        for stage in self.output_blocks:
            other: Tensor | None = skips.pop()
            for layer in stage:
                if isinstance(layer, Upsample):
                    up = ops.upsample_conv(pending.written(ops), layer.conv.weight)
                    pending = Pending(up, layer.conv.bias)
                else:
                    pending, _ = self._layer(layer, pending, other, times, texts)
                    other = None
        norm, last = self.out[0], self.out[2]
        normal = norm.apply_to(ops, pending.x, pending.shift, pending.residual, None, False)
        return Pending(ops.conv(normal, last.weight), last.bias).written(ops)

    def _layer(
        self,
        layer: nn.Module,
        pending: Pending,
        other: Tensor | None,
        times: Iterator,
        texts: Iterator,
    ) -> tuple[Pending, Tensor]:
        inputs = (
            (pending, other, next(times)) if isinstance(layer, ResBlock) else (pending, next(texts))
        )
        if self.config.activation_checkpointing:
            # Nothing in the network is random.
            return checkpoint(
                layer, *inputs, self.ops, use_reentrant=False, preserve_rng_state=False
            )
        return layer(*inputs, self.ops)
