"""The UNet of Stable Diffusion v2, written to be read.

The network of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752, section 3.3 and appendix E), in the sizes of SD v2. It is the oracle that the fast UNet
is held to, so it uses plain torch alone. Parameters have the names of the LDM code base
(`ldm/modules/diffusionmodules/openaimodel.py`), without the prefix `model.diffusion_model.` that
checkpoints add.

Shape letters: B batch, C channels, H and W latent rows and columns, L tokens, D channels per
attention head, E channels of the time embedding (4 x model_channels).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_perf.config import UNetConfig

MAX_PERIOD = 10_000
"""longest wavelength of the time embedding, in units of 2 pi timesteps"""
KeysValues = tuple[Tensor, Tensor]


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Timesteps (B,) to float32 features (B, dim): dim/2 cosines, then sines of the same angles.

    "Attention Is All You Need" (arXiv 1706.03762), section 3.5, but with cosines and sines in two
    halves instead of interleaved. Angles reach 999 radians, so they are computed in float32
    whatever the precision of the network.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set the weight and bias of a layer to 0; returns the layer.

    A residual branch that ends in such a layer adds nothing at the start of training.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1)


class ResBlock(nn.Module):
    """Residual block of two convolutions, between which the time embedding is added.

    x (B, C, H, W), emb (B, E) -> (B, C', H, W). Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=1e-5), nn.SiLU(), conv3x3(channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            # LDM has dropout here, which SD v2 sets to 0. The Identity keeps the convolution's
            # index, hence its parameter name, out_layers.3.
            nn.Identity(),
            zeroed(conv3x3(out_channels, out_channels)),
        )
        same = channels == out_channels
        self.skip_connection = (
            nn.Identity() if same else nn.Conv2d(channels, out_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention: x (B, L, C), context (B, L', C') -> (B, L, C).

    Rombach et al. 2022, section 3.3. Nothing is masked: padding tokens are attended like others.
    The context may be given as its `keys_values`.
    """

    def __init__(self, channels: int, context_channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        queries = self.to_q(x)  # first: gradients of self-attention's x are summed in this order
        keys, values = context if isinstance(context, tuple) else self.keys_values(context)
        q, k, v = (self.heads(t) for t in (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D)) v
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a context (B, L', C'), (B, L', C) each."""
        return self.to_k(context), self.to_v(context)

    def heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: (B, L, C) -> (B, C / D, L, D)."""
        return x.unflatten(2, (-1, self.head_channels)).transpose(1, 2)


class GEGLU(nn.Module):
    """value * GELU(gate), both linear in x: (B, L, C) -> (B, L, C').

    Shazeer 2020 (arXiv 2002.05202), equation 5, with the exact GELU, not its tanh approximation.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Feed-forward layer with 4C hidden channels: (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The Identity stands for LDM's dropout, as in ResBlock.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each a residual branch.

    x (B, L, C), context (B, L', C') -> (B, L, C). Every branch starts with its LayerNorm.
    """

    def __init__(self, channels: int, context_dim: int, head_channels: int) -> None:
        super().__init__()
        # The order of these lines is LDM's order of parameters, not that of computation.
        self.attn1 = Attention(channels, channels, head_channels)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, head_channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A residual branch with a transformer whose tokens are the H W pixels.

    x (B, C, H, W), context (B, L', C') -> (B, C, H, W).
    """

    def __init__(self, channels: int, context_dim: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # LDM's eps here, 1e-5 elsewhere
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, head_channels)]
        )
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, L = H*W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve height and width by a strided convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Repeat every pixel, then convolve: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in sequence. ResBlocks also get the time embedding, transformers the next context."""

    def forward(self, x: Tensor, emb: Tensor, contexts: Iterator[Tensor | KeysValues]) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, next(contexts))
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The denoising network: 865,910,724 parameters in the benchmark's configuration.

    Weights have torch's default initialisation, except that the last layer of every ResBlock, of
    every SpatialTransformer and of the network is 0. So the first output is 0. Parameters are
    registered in LDM's order. They are drawn in another: `Upsample` is made before the ResBlock and
    the transformer that stand before it. So from the same seed 56 of the 686 tensors of the
    benchmark's network start at other draws, of the same distributions, than those of a network
    that is made in the order of registration.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_channels = 4 * config.model_channels
        widths = [mult * config.model_channels for mult in config.channel_mult]

        def res_block(channels: int, out_channels: int) -> nn.Module:
            return ResBlock(channels, out_channels, emb_channels, config.resblock_groups)

        def transformer(channels: int) -> nn.Module:
            head_channels, groups = config.num_head_channels, config.transformer_groups
            return SpatialTransformer(channels, config.context_dim, head_channels, groups)

        def layers(channels: int, level: int) -> list[nn.Module]:
            attends = 2**level in config.attention_resolutions
            return [
                res_block(channels, widths[level]),
                *([transformer(widths[level])] if attends else []),
            ]

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )

        channels = config.model_channels
        skips = [channels]  # channels of each skip, in the order in which they are pushed
        self.input_blocks = nn.ModuleList([Stage([conv3x3(config.in_channels, channels)])])
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(layers(channels, level)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = Stage(
            [res_block(channels, channels), transformer(channels), res_block(channels, channels)]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(config.num_res_blocks + 1):
                last = block == config.num_res_blocks
                upsample = [Upsample(width)] if last and level > 0 else []
                self.output_blocks.append(
                    Stage([*layers(channels + skips.pop(), level), *upsample])
                )
                channels = width

        self.out = nn.Sequential(
            nn.GroupNorm(config.resblock_groups, channels, eps=1e-5),
            nn.SiLU(),
            zeroed(conv3x3(channels, config.out_channels)),
        )

    def project_text(self, context: Tensor) -> list[Tensor]:
        """Keys beside values (B, L, 2C) for each transformer, from context (B, L, context_dim).

        They depend on the context alone, so that a sampler computes them once for all its steps.
        """
        attentions = [b.attn2 for b in self.modules() if isinstance(b, TransformerBlock)]
        return [torch.cat(attention.keys_values(context), dim=-1) for attention in attentions]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        """Predict v (Salimans & Ho 2022, arXiv 2202.00512, section 4) from noisy latents.

        latents: (B, in_channels, H, W); H and W are multiples of `config.downsampling`.
        timesteps: (B,) int64.
        context: text states (B, L, context_dim), or what `project_text` made of them.

        Returns (B, out_channels, H, W) in the dtype of the weights, or autocast's.
        """
        features = sinusoidal_embedding(timesteps, self.config.model_channels)
        emb = self.time_embed(features.to(latents.dtype))
        contexts: Iterator[Tensor | KeysValues]
        if isinstance(context, list):
            contexts = ((k, v) for k, v in (both.chunk(2, dim=-1) for both in context))
        else:
            contexts = repeat(context)
        h, skips = latents, []
        for stage in self.input_blocks:
            h = stage(h, emb, contexts)
            skips.append(h)
        h = self.middle_block(h, emb, contexts)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, contexts)
        return self.out(h)
