"""Section `kernels`: which backend runs each operator of the fast network."""

from __future__ import annotations

from dataclasses import dataclass

from sd_perf.config.rules import Section


@dataclass(frozen=True)
class KernelsConfig(Section):
    """Which implementation runs each operator: auto, or a backend that `sd-perf doctor` lists."""

    section = "kernels"

    adamw: str = "auto"
    """the optimizer's update"""
    attention: str = "auto"
    """attention of the transformers, to themselves and to the text"""
    conv: str = "auto"
    """3x3 convolutions"""
    diffusion_inputs: str = "auto"
    """latents, noise and target from moments"""
    fp8_linear: str = "auto"
    """linear layers in FP8"""
    geglu: str = "auto"
    """gated activation of the feed-forwards"""
    group_norm: str = "auto"
    """GroupNorm with what surrounds it"""
    layer_norm: str = "auto"
    """LayerNorm of the transformers"""
    linear: str = "auto"
    """linear layers in 16 or 32 bits"""
    residual_add: str = "auto"
    """sum of a block's branch and its input"""
    skip_conv: str = "auto"
    """1x1 convolutions of the skips, over two sources"""
    upsample_conv: str = "auto"
    """upsampling with the convolution that follows"""
    v_mse_loss: str = "auto"
    """mean squared error of the prediction"""
    strict: bool = False
    """make auto fail where it would pass over a faster backend"""
