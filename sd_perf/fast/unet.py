"""The UNet of Stable Diffusion v2 from fused operators: `reference.unet` in fewer memory passes.

- All activations are channels-last (NHWC), the layout of the tensor cores.
- A sum is not written where it arises. The bias of a layer, the time shift and the residual wait
  in a `Pending` until a norm reads them; the norm also returns the sum, for the skips.
- A gradient is not added where it arises: the norms take those of all later uses of what they read.
- One matmul makes queries, keys and values; one the keys and values of the text for all
  transformers, once per step; one the time projections of all ResBlocks.
- A norm that reads two sources writes their concatenation, for its skip convolution and for both
  backward passes. Upsampling is part of the convolution that follows it.
- The number format of a linear layer, and whether its LayerNorm or GEGLU is fused with it, is up to
  `fast.linear`.

Parameters have the names, shapes and order of `reference.unet`, so weights, optimizer state and
checkpoints pass between the two unchanged. Weights of several layers that one matmul reads are
adjacent in training's flat buffer, and concatenated elsewhere.

Shape letters: B batch, C channels, H and W rows and columns, L tokens, T text tokens, E channels of
the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd_perf.config import PrecisionConfig, UNetConfig
from sd_perf.fast.linear import LinearLayer, LinearPrecision
from sd_perf.fast.ops import Ops, with_weights_cast
from sd_perf.fast.pending import Norm, Pending, added, as_image, as_tokens, packed
from sd_perf.reference.unet import MAX_PERIOD, zeroed


class ResBlock(nn.Module):
    """Two convolutions with the input added to their result: (pending, skip) -> (pending, sum).

    On the way up the input is the concatenation of `pending` and `skip`. The second result is the
    written input: on the way down a later skip.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        # The places of SiLU and dropout in LDM's Sequentials are kept, for the parameters' names.
        norm = Norm(groups, channels, eps=1e-5, silu=True)
        self.in_layers: Any = nn.Sequential(norm, nn.Identity(), conv)
        self.emb_layers: Any = nn.Sequential(nn.Identity(), nn.Linear(emb_channels, out_channels))
        last = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        norm = Norm(groups, out_channels, eps=1e-5, silu=True)
        self.out_layers: Any = nn.Sequential(norm, nn.Identity(), nn.Identity(), last)
        same = channels == out_channels
        self.skip_connection: Any = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(
        self, pending: Pending, skip: Tensor | None, time: Tensor, bias: Tensor, ops: Ops
    ) -> tuple[Pending, Tensor]:
        """time (B, C') is the projected time embedding plus the first convolution's bias.

        bias (C',) is that of the second convolution and, where there is one, of the 1x1.
        """
        # On the way down the sum is read twice more: here and, as a skip, on the way up.
        return_sum = 2 if skip is None else 1
        normal, summed, *again = self.in_layers[0](pending, ops, skip, return_sum=return_sum)
        h = ops.conv(normal, self.in_layers[2].weight)
        # The first convolution has no bias of its own here: `time` brings it.
        h = self.out_layers[0](Pending(h, time), ops)
        h = ops.conv(h, self.out_layers[3].weight)
        # The bias waits with the residual for the next norm.
        residual = summed
        if isinstance(self.skip_connection, nn.Conv2d):
            residual = ops.skip_conv(summed, self.skip_connection.weight)
        return Pending(h, bias, residual), again[0] if again else summed


class Attention(nn.Module):
    """Parameters of an attention, in LDM's layout."""

    def __init__(self, channels: int, context_channels: int, precision: LinearPrecision) -> None:
        super().__init__()
        self.layer = precision.layer("attention", channels, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out: Any = nn.Sequential(nn.Linear(channels, channels))

    def out(self, attended: Tensor, following: LinearLayer) -> tuple[Tensor, Tensor | None]:
        """The output layer; and its bias, where the following layer's norm sums the gradient."""
        bias, left = following.left_to_norm(self.to_out[0].bias)
        return self.layer.linear(attended, self.to_out[0].weight, bias), left


class TransformerBlock(nn.Module):
    """tokens (B, L, C), keys and values of the text (B, T, 2C) -> (B, L, C)."""

    def __init__(
        self, channels: int, context_dim: int, head_channels: int, precision: LinearPrecision
    ) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.attn1 = Attention(channels, channels, precision)
        gated: Any = nn.Module()
        gated.proj = nn.Linear(channels, 8 * channels)
        self.ff: Any = nn.Module()
        self.ff.net = nn.Sequential(gated, nn.Identity(), nn.Linear(4 * channels, channels))
        self.attn2 = Attention(channels, context_dim, precision)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels, eps=1e-5) for _ in range(3))
        self.qkv = precision.layer("attention", channels, 3 * channels, bias=False)
        self.query = precision.layer("attention", channels, channels, bias=False)
        self.widen = precision.layer("feed_forward", channels, 8 * channels, bias=False)
        self.narrow = precision.layer("feed_forward", 4 * channels, channels)
        self.feed_forward = precision.feed_forward(self.widen, self.narrow)

    def forward(self, tokens: Tensor, text: Tensor, ops: Ops, bias: Tensor | None) -> Tensor:
        """`bias` is that of the layer that made the tokens, where `qkv.left_to_norm` leaves one."""
        # One matmul for q, k and v reads the normalised tokens once instead of three times. Each
        # LayerNorm first adds what came before it, so no residual sum is a pass of its own.
        weight = packed([self.attn1.to_q.weight, self.attn1.to_k.weight, self.attn1.to_v.weight])
        h, tokens = self.qkv.after_layer_norm(tokens, None, self.norm1, weight, x_bias=bias)
        h, bias = self.attn1.out(ops.attention(h, num_heads=self.num_heads), self.query)
        weights = self.norm2, self.attn2.to_q.weight
        h, tokens = self.query.after_layer_norm(h, tokens, *weights, x_bias=bias)
        h, bias = self.attn2.out(ops.attention(h, text, num_heads=self.num_heads), self.widen)
        layers = self.norm3, self.ff.net[0].proj, self.ff.net[2]
        h, tokens = self.feed_forward(h, tokens, *layers, x_bias=bias)
        # No norm follows: the sum must be written.
        return ops.residual_add(h, tokens)


class SpatialTransformer(nn.Module):
    """A transformer over the H*W pixels as tokens: (pending, text) -> (pending, sum).

    text (B, T, 2C) holds keys and values; the second result is the written sum of `pending`.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        head_channels: int,
        groups: int,
        precision: LinearPrecision,
    ) -> None:
        super().__init__()
        self.norm = Norm(groups, channels, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, head_channels, precision)]
        )
        self.proj_out: Any = zeroed(nn.Linear(channels, channels))
        self.entrance, self.exit = (
            precision.layer("transformer_ends", channels, channels, bias=bias)
            for bias in (True, False)
        )

    def forward(self, pending: Pending, text: Tensor, ops: Ops) -> tuple[Pending, Tensor]:
        normal, summed = self.norm(pending, ops, return_sum=1)
        block: Any = self.transformer_blocks[0]
        bias, left = block.qkv.left_to_norm(self.proj_in.bias)
        tokens = self.entrance.linear(as_tokens(normal), self.proj_in.weight, bias)
        tokens = block(tokens, text, ops, left)
        # The bias waits for the next norm, whose backward pass also sums its gradient.
        out = self.exit.linear(tokens, self.proj_out.weight)
        return Pending(as_image(out, summed), self.proj_out.bias, summed), summed


class Downsample(nn.Module):
    """Parameters of a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Parameters of a 3x3 convolution of the image enlarged twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)


class FastUNet(nn.Module):
    """The denoiser: parameters, arguments and results of `reference.unet.UNet`."""

    def __init__(
        self, config: UNetConfig, ops: Ops, precision: PrecisionConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.ops = config, with_weights_cast(ops)
        self.precision = LinearPrecision(self.ops, precision or PrecisionConfig())
        model, E = config.model_channels, 4 * config.model_channels
        widths = [mult * model for mult in config.channel_mult]

        half = model // 2
        steps = torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
        # As bits, since a float32 buffer would follow the parameters to another dtype.
        self.register_buffer("frequency_bits", frequencies.view(torch.int32), persistent=False)

        # Layers are made in the plain UNet's order, because each draws its initial weights.
        self.time_embed: Any = nn.Sequential(nn.Linear(model, E), nn.SiLU(), nn.Linear(E, E))
        first = nn.Conv2d(config.in_channels, model, 3, padding=1)
        self.input_blocks: Any = nn.ModuleList([nn.ModuleList([first])])
        channels, skips = model, [model]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(self._layers(channels, width, level)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block: Any = nn.ModuleList([self._res_block(channels, channels)])
        self.middle_block.append(self._transformer(channels))
        self.middle_block.append(self._res_block(channels, channels))
        self.output_blocks: Any = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(config.num_res_blocks + 1):
                is_last = block == config.num_res_blocks
                upsample = [Upsample(width)] if is_last and level > 0 else []  # drawn first
                stage = [*self._layers(channels + skips.pop(), width, level), *upsample]
                self.output_blocks.append(nn.ModuleList(stage))
                channels = width
        norm = Norm(config.resblock_groups, channels, eps=1e-5, silu=True)
        last = zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        self.out: Any = nn.Sequential(norm, nn.Identity(), last)

        # Found once: a step would walk over all modules three times, a millisecond each.
        self._res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        self._text_attentions = [block.attn2 for block in blocks]
        self._text_widths = [2 * layer.to_k.out_features for layer in self._text_attentions]
        text_features = sum(self._text_widths)
        self.text = self.precision.layer("text", config.context_dim, text_features, bias=False)
        # A submodule, to be moved with the UNet; it has no entry in the state dict.
        self.delayed_scaling = self.precision.scaling
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _res_block(self, channels: int, out_channels: int) -> nn.Module:
        emb_channels, groups = 4 * self.config.model_channels, self.config.resblock_groups
        return ResBlock(channels, out_channels, emb_channels=emb_channels, groups=groups)

    def _transformer(self, channels: int) -> nn.Module:
        config = self.config
        return SpatialTransformer(
            channels,
            context_dim=config.context_dim,
            head_channels=config.num_head_channels,
            groups=config.transformer_groups,
            precision=self.precision,
        )

    def _layers(self, channels: int, out_channels: int, level: int) -> list[nn.Module]:
        layers = [self._res_block(channels, out_channels)]
        if 2**level in self.config.attention_resolutions:
            layers.append(self._transformer(out_channels))
        return layers

    def _packed_parameters(self) -> list[list[Tensor]]:
        """The parameters that `packed` puts together at the beginning, as they are to lie."""
        blocks = self._res_blocks
        widening = [b for b in blocks if isinstance(b.skip_connection, nn.Conv2d)]
        layers = [block.emb_layers[1] for block in blocks]
        texts = [w for each in self._text_attentions for w in (each.to_k.weight, each.to_v.weight)]
        return [
            texts,
            [layer.weight for layer in layers],
            [each.bias for each in (*layers, *(block.in_layers[2] for block in blocks))],
            [block.out_layers[3].bias for block in widening]
            + [block.skip_connection.bias for block in widening],
        ]

    def parameters_by_use(self) -> list[tuple[nn.Module, list[str]]]:
        """Names of all parameters in the order of the forward pass, in groups.

        A group stands beside the module whose call comes before the first use of its parameters:
        first the network itself, then every ResBlock and transformer.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        first = list(self.time_embed.parameters())
        first += [parameter for parts in self._packed_parameters() for parameter in parts]
        groups: list[tuple[nn.Module, list[str]]]
        groups = [(self, [names.pop(id(parameter)) for parameter in first])]
        blocks = {
            prefix: module
            for prefix, module in self.named_modules()
            if isinstance(module, ResBlock | SpatialTransformer)
        }
        for name in names.values():
            owner = next(
                (blocks[prefix] for prefix in blocks if name.startswith(f"{prefix}.")), None
            )
            if owner and owner is not groups[-1][0]:
                groups.append((owner, []))
            groups[-1][1].append(name)
        return groups

    def project_text(self, context: Tensor) -> list[Tensor]:
        """Keys and values (B, T, 2C) for each transformer from context (B, T, D), by one matmul."""
        text = self.text.linear(context, packed(self._packed_parameters()[0]))
        return list(text.split(self._text_widths, dim=-1))

    def project_time(self, timesteps: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The shift (B, C') that each ResBlock's second norm adds, by one matmul for all blocks.

        A shift is the block's projected time embedding plus the bias of its first convolution.
        """
        _, weights, biases, _ = self._packed_parameters()
        # Angles are float32: they reach 999 radians, of which bfloat16 keeps three digits.
        angles = timesteps[:, None] * self.get_buffer("frequency_bits").view(torch.float32)
        features = torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
        into, out = self.time_embed[0], self.time_embed[2]
        hidden = F.silu(self.ops.linear(features, into.weight, into.bias))
        embedding = F.silu(self.ops.linear(hidden, out.weight, out.bias))
        shifts = self.ops.linear(embedding, packed(weights), added(biases))
        return list(shifts.split([weight.shape[0] for weight in weights], dim=-1))

    def pending_biases(self) -> list[Tensor]:
        """What each ResBlock leaves to the next norm: its last bias, and that of its 1x1 if any."""
        *_, biases = self._packed_parameters()
        half = biases[: len(biases) // 2]
        sums = dict(zip(half, added(biases).split([len(bias) for bias in half]), strict=True))
        alone = [block.out_layers[3].bias for block in self._res_blocks]
        return [sums.get(bias, bias) for bias in alone]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        """Predicts v (B, 4, H, W) from noisy latents (B, 4, H, W), timesteps and context.

        timesteps is (B,) int64. context is (B, T, D), or the list that `project_text` made of it:
        a sampler projects the text once for all its steps. Computes in autocast's dtype where that
        is on, else in that of the latents; statistics are float32 in both.
        """
        device = latents.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else latents.dtype
        with torch.autocast(device, enabled=False), self.precision.step():
            if not isinstance(context, list):
                context = self.project_text(context.to(dtype))
            texts = [text.to(dtype) for text in context]
            return self._predict(latents.to(dtype), timesteps, texts)

    def _predict(self, latents: Tensor, timesteps: Tensor, texts: list[Tensor]) -> Tensor:
        ops = self.ops
        # Each ResBlock takes the next time shift and bias, each transformer the next text.
        shifts = self.project_time(timesteps, latents.dtype)
        next_time = zip(shifts, self.pending_biases(), strict=True)
        next_text = iter(texts)
        first = self.input_blocks[0][0]
        latents = latents.contiguous(memory_format=torch.channels_last)
        pending, skips = Pending(ops.conv(latents, first.weight), first.bias), []
        # A stage's input is a skip: its first layer writes the sum that is still pending there.
        for stage in [*self.input_blocks[1:], self.middle_block]:
            for place, layer in enumerate(stage):
                if isinstance(layer, Downsample):
                    summed = pending.written(ops)
                    pending = Pending(ops.conv(summed, layer.op.weight, stride=2), layer.op.bias)
                else:
                    pending, summed = self._layer(
                        layer, pending, skip=None, times=next_time, texts=next_text
                    )
                if place == 0:
                    skips.append(summed)
        for stage in self.output_blocks:
            skip: Tensor | None = skips.pop()
            for layer in stage:
                if isinstance(layer, Upsample):
                    up = ops.upsample_conv(pending.written(ops), layer.conv.weight)
                    pending = Pending(up, layer.conv.bias)
                else:
                    pending, _ = self._layer(
                        layer, pending, skip=skip, times=next_time, texts=next_text
                    )
                    skip = None  # the stage's first layer has read it
        norm, last = self.out[0], self.out[2]
        return Pending(ops.conv(norm(pending, ops), last.weight), last.bias).written(ops)

    def _layer(
        self,
        layer: nn.Module,
        pending: Pending,
        *,
        skip: Tensor | None,
        times: Iterator[tuple[Tensor, Tensor]],
        texts: Iterator[Tensor],
    ) -> tuple[Pending, Tensor]:
        """A ResBlock with its time shift and bias, or a transformer with its text."""
        is_res_block = isinstance(layer, ResBlock)
        inputs = (pending, skip, *next(times)) if is_res_block else (pending, next(texts))
        if self.config.activation_checkpointing:
            # Nothing in the network is random, so there is no generator state to preserve.
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(layer, *inputs, self.ops, **options)
        return layer(*inputs, self.ops)
