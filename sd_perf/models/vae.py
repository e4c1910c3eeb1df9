"""The autoencoder of Stable Diffusion: images to moments of latents, and latents to images.

The KL-regularised autoencoder of Rombach et al. (arXiv 2112.10752, section 3.1 and appendix G). It
is frozen in training. Parameters have the names of the LDM code base
(`ldm/modules/diffusionmodules/model.py`), without the prefix `first_stage_model.` that checkpoints
add.

Shape letters: B batch, C channels, H and W image rows and columns, f down-sampling factor, Z latent
channels, L tokens (pixels of the smallest level).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_CHANNELS = 3
PIXELS_PER_LATENT = 8
"""image pixels per latent pixel along each side, in Stable Diffusion's autoencoder"""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. Defaults are Stable Diffusion's: 83,653,863 parameters, f = 8."""

    channels: int = 128
    """channels of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """channels of each level, in units of `channels`; all levels but the last halve height and
    width"""
    num_res_blocks: int = 2
    """ResBlocks per level of the encoder (the decoder has one more)"""
    latent_channels: int = 4
    """channels of the latents; the moments have twice as many"""
    groups: int = 32
    """GroupNorm groups everywhere"""

    @property
    def downsampling(self) -> int:
        """f: image pixels per latent pixel along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [mult * self.channels for mult in self.channel_mult]


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv1x1(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=1)


def conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """Residual block of two convolutions: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(channels, groups)
        self.conv1 = conv3x3(channels, out_channels)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = conv3x3(out_channels, out_channels)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else conv1x1(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


def res_blocks(channels: int, out_channels: int, count: int, groups: int) -> nn.Sequential:
    """ResBlocks in sequence, (B, C, H, W) -> (B, C', H, W); the first changes the channels."""
    inputs = [channels] + [out_channels] * (count - 1)
    return nn.Sequential(*(ResBlock(width, out_channels, groups) for width in inputs))


class Attention(nn.Module):
    """Self-attention of one head over the L = H W pixels: (B, C, H, W) -> (B, C, H, W).

    The projections are 1x1 convolutions.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = conv1x1(channels, channels)
        self.k = conv1x1(channels, channels)
        self.v = conv1x1(channels, channels)
        self.proj_out = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # each (B, 1, L, C)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (self.q(h), self.k(h), self.v(h)))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    """The blocks at the lowest resolution, with attention: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Strided convolution, padded right and below only: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat every pixel, then convolve: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DownLevel(nn.Module):
    """One level of the encoder: (B, C, H, W) -> (B, C', H/2, W/2), or (B, C', H, W) at the last."""

    def __init__(
        self, channels: int, out_channels: int, config: AutoencoderConfig, last: bool
    ) -> None:
        super().__init__()
        self.block = res_blocks(channels, out_channels, config.num_res_blocks, config.groups)
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """One level of the decoder: (B, C, H, W) -> (B, C', 2H, 2W), or (B, C', H, W) at the last."""

    def __init__(
        self, channels: int, out_channels: int, config: AutoencoderConfig, last: bool
    ) -> None:
        super().__init__()
        self.block = res_blocks(channels, out_channels, config.num_res_blocks + 1, config.groups)
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, 2Z, H/f, W/f), which quant_conv makes moments."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        inputs = [config.channels, *widths[:-1]]
        coarsest = len(widths) - 1
        self.conv_in = conv3x3(IMAGE_CHANNELS, config.channels)
        self.down = nn.ModuleList(
            DownLevel(channels, width, config, last=level == coarsest)
            for level, (channels, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = norm(widths[-1], config.groups)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents after post_quant_conv (B, Z, H/f, W/f) -> images (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = conv3x3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], config.groups)
        # As in LDM, up[i] has the resolution of the encoder's down[i], so forward goes through the
        # list from its end.
        self.up = nn.ModuleList(
            UpLevel(channels, width, config, last=level == 0)
            for level, (channels, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = norm(widths[0], config.groups)
        self.conv_out = conv3x3(widths[0], IMAGE_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """The whole autoencoder: `encode` to the moments of a Gaussian over latents, and `decode`."""

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or AutoencoderConfig()
        moments, latents = 2 * self.config.latent_channels, self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = conv1x1(moments, moments)
        self.post_quant_conv = conv1x1(latents, latents)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to moments (B, 2Z, H/f, W/f): Z means, then Z log-variances.

        H and W are multiples of f. The moments are neither scaled nor clamped. The weights were
        trained on images in [-1, 1]; the benchmark's moments were made from images in [0, 1], and
        are used as they are.
        """
        return self.quant_conv(self.encoder(images))

    def decode(self, z0: Tensor) -> Tensor:
        """Latents z0 (B, Z, H/f, W/f) to images (B, 3, H, W), roughly in [-1, 1], not clamped.

        z0 is unscaled: the latents of the diffusion model divided by their scale, 0.18215.
        """
        return self.decoder(self.post_quant_conv(z0))
