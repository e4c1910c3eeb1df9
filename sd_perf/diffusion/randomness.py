"""The random streams of a sample.

The generator is `sd_kernels.philox`, re-exported here. It lies in the kernel package because the
kernels that draw their own noise are compared with it.
"""

from __future__ import annotations

from enum import IntEnum

from sd_kernels.philox import normal, philox, philox_4x32, uniform_integers

__all__ = ["Stream", "normal", "philox", "philox_4x32", "uniform_integers"]


class Stream(IntEnum):
    """Purposes of a draw. The streams of one sample are independent of one another.

    The numbers enter the Philox counter, so changing one changes every result.
    """

    TIMESTEP = 0
    """timestep of a training step"""
    NOISE = 1
    """noise added to the latents in a training step"""
    MOMENTS = 2
    """noise that draws the latents from the autoencoder's posterior"""
    SAMPLER = 3
    """noise that DDIM starts from"""
    ORDER = 4
    """order of the samples in an epoch"""
    SYNTHETIC = 5
    """synthetic moments and context"""
    OFFSET = 6
    """noise per channel, added to NOISE where diffusion.offset_noise asks for it"""
    CAPTION = 7
    """whether a training step leaves out the caption"""
    VIEW = 8
    """flip and crop of a picture"""
