"""Random draws, latents, noising and target in one pass: reads moments, writes the results.

Random numbers never touch memory. One Philox call gives four words, and these the normals of four
adjacent pixels of one channel, so a thread draws the numbers of the elements that it reads. Moments
are read channel by channel; results are written with channels as the fastest axis. Normals are
computed in float64, as `philox.normal` does, and so equal its bits, except where two float64
libraries fall on different sides of a rounding border of float32. The benchmark's size takes 2^20
logarithms, roots and sines: some microseconds of a Hopper GPU.

Shape letters: B samples, C latent channels, HW pixels, T timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.errors import FLOATING, require, require_floating
from sd_kernels.launch import empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    pixels: int = 256
    """pixels of a program: with four channels 8 elements for each thread of 4 warps"""


TUNING = Tuning()
# Taylor series of sin(x) / x and of cos(x) to x^14: within pi / 4 the next term is at most 1e-15.
_SINE = tl.constexpr([(-1) ** n / math.factorial(2 * n + 1) for n in range(8)])
_COSINE = tl.constexpr([(-1) ** n / math.factorial(2 * n) for n in range(8)])


@triton.jit
def _box_muller(first, second):
    """Two independent normals from two words, float32.

    Box and Muller, "A Note on the Generation of Random Normal Deviates" (1958); `philox.normal`.
    """
    # Uniform numbers of 24 bits: (0, 1] for the logarithm, [0, 1) turns for the angle.
    uniform = ((first >> 8) + 1).to(tl.float64) * 5.9604644775390625e-08  # 2^-24
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    # The angle is a number of quarter turns and at most an eighth of a turn either side. Reduced in
    # integers, it loses nothing, and the series needs few terms.
    turned = (second >> 8) + 0x200000
    quarter = turned >> 22
    eighth = (turned & 0x3FFFFF).to(tl.int32) - 0x200000
    angle = eighth.to(tl.float64) * 3.7450702829239286e-07  # 2 pi 2^-24
    square = angle * angle
    sine = square * _SINE[7] + _SINE[6]
    cosine = square * _COSINE[7] + _COSINE[6]
    for n in tl.static_range(5, -1, -1):
        sine = sine * square + _SINE[n]
        cosine = cosine * square + _COSINE[n]
    along, across = (radius * cosine).to(tl.float32), (radius * (sine * angle)).to(tl.float32)
    # A quarter turn swaps cosine and sine and changes one sign.
    is_odd = (quarter & 1) == 1
    x, y = tl.where(is_odd, across, along), tl.where(is_odd, along, across)
    return tl.where(((quarter + 1) & 2) == 2, -x, x), tl.where((quarter & 2) == 2, -y, y)


@triton.jit
def _normals(seed, blocks, stream, low, high):
    """Normals of shape (C, 4N) from Philox blocks (C, N)."""
    word_0, word_1, word_2, word_3 = tl.philox(seed, blocks, stream, low, high)
    normal_0, normal_1 = _box_muller(word_0, word_1)
    normal_2, normal_3 = _box_muller(word_2, word_3)
    # Words 0 to 3 of a block belong to adjacent pixels: interleaving twice gives 0, 1, 2, 3.
    return tl.interleave(tl.interleave(normal_0, normal_2), tl.interleave(normal_1, normal_3))


# Each specialisation of the seed (1, a multiple of 16, any) would be compiled anew.
@triton.jit(do_not_specialize=["seed"])
def diffusion_inputs_kernel(
    moments, sample_indices, signals, sigmas, noisy, target, timesteps, seed: tl.int64,
    latent_scale: tl.float32, TIMESTEP: tl.constexpr, NOISE: tl.constexpr, MOMENTS: tl.constexpr,
    EPSILON: tl.constexpr, T: tl.constexpr, HW: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    # One axis for both, since the others of a grid end at 65,535.
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    sample, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    index = tl.load(sample_indices + sample)  # narrow: one number a program
    # The counter is (element // 4, stream, index low, index high); see `philox`.
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, 0, TIMESTEP, low, high)
    # The high word of word * T: uniform in [0, T) without a division.
    timestep = ((word.to(tl.uint64) * T) >> 32).to(tl.int64)
    if tile == 0:
        tl.store(timesteps + sample, timestep)  # narrow: one number a sample
    signal = tl.load(signals + timestep)  # narrow: one number a program
    sigma = tl.load(sigmas + timestep)  # narrow: one number a program

    first = tile * PIXELS
    channels, pixels = tl.arange(0, C)[:, None], first + tl.arange(0, PIXELS)[None, :]
    source = moments + sample * (2 * C * HW) + channels * HW + pixels
    mean = tl.load(source, mask=pixels < HW).to(tl.float32)
    logvar = tl.load(source + C * HW, mask=pixels < HW).to(tl.float32)
    # The posterior of Rombach et al. (2022): log-variances are clamped, NaN stays NaN.
    std = tl.exp(0.5 * tl.clamp(logvar, -30.0, 20.0, propagate_nan=tl.PropagateNan.ALL))
    blocks = channels * (HW // 4) + first // 4 + tl.arange(0, PIXELS // 4)[None, :]
    latents = latent_scale * (mean + std * _normals(seed, blocks, MOMENTS, low, high))
    noise = _normals(seed, blocks, NOISE, low, high)

    # Transposed to (pixels, channels), the order of channels-last memory: writes are contiguous.
    written = first * C + tl.arange(0, C * PIXELS)
    inside = written < HW * C
    # Ho et al. (2020), eq. 4.
    x = tl.reshape(tl.trans(signal * latents + sigma * noise), (C * PIXELS,))
    tl.store(noisy + sample * (C * HW) + written, x, mask=inside)
    # The noise itself, or v: Salimans and Ho (2022), section 4.
    aim = noise if EPSILON else signal * noise - sigma * latents
    aim = tl.reshape(tl.trans(aim), (C * PIXELS,))
    tl.store(target + sample * (C * HW) + written, aim, mask=inside)


@torch.library.custom_op("sd_kernels::diffusion_inputs_forward", mutates_args=())
def diffusion_inputs_forward(
    moments: torch.Tensor,
    sample_indices: torch.Tensor,
    signals: torch.Tensor,
    sigmas: torch.Tensor,
    seed: int,
    latent_scale: float,
    streams: list[int],
    is_epsilon: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`diffusion_inputs` with `streams` (timestep, noise, moments) and a signed 64-bit seed."""
    B, C, H, W = moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]
    noisy, target = (empty(moments, (B, H, W, C), out) for out in (dtype, torch.float32))
    timesteps = empty(sample_indices, (B,))
    pixels = min(TUNING.pixels, triton.next_power_of_2(H * W))
    launch(
        diffusion_inputs_kernel,
        (triton.cdiv(H * W, pixels) * B,),
        *(moments, sample_indices, signals, sigmas, noisy, target, timesteps, seed, latent_scale),
        **dict(zip(("TIMESTEP", "NOISE", "MOMENTS"), streams, strict=True)),
        **{"EPSILON": is_epsilon, "T": len(signals), "HW": H * W, "C": C, "PIXELS": pixels},
    )
    return rounded(noisy, dtype).permute(0, 3, 1, 2), target.permute(0, 3, 1, 2), timesteps


@diffusion_inputs_forward.register_fake
def _(
    moments: torch.Tensor,
    sample_indices: torch.Tensor,
    signals: torch.Tensor,
    sigmas: torch.Tensor,
    seed: int,
    latent_scale: float,
    streams: list[int],
    is_epsilon: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C, H, W = moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]
    noisy, target = (
        moments.new_empty((B, H, W, C), dtype=out).permute(0, 3, 1, 2)
        for out in (dtype, torch.float32)
    )
    return noisy, target, torch.empty_like(sample_indices)


def diffusion_inputs(
    moments: torch.Tensor,
    sample_indices: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    seed: int,
    latent_scale: float,
    timestep_stream: int,
    noise_stream: int,
    moments_stream: int,
    prediction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.diffusion_inputs`; not differentiable.

    Takes contiguous moments of float32, bfloat16 or float16, with C a power of two and H x W a
    multiple of 4; otherwise KernelError.
    """
    op, tables = "diffusion_inputs", (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    require_floating(op, moments, *tables)
    require(prediction in ("v", "epsilon"), op, f"prediction {prediction!r}", "v or epsilon")
    require(dtype in FLOATING, op, f"dtype {dtype}", "float32, bfloat16 or float16")
    shape = tuple(moments.shape)
    fits = (
        len(shape) == 4
        and (shape[1] // 2).bit_count() == 1
        and shape[1] % 2 == 0
        and shape[2] * shape[3] % 4 == 0
    )
    require(
        fits,
        op,
        f"moments {shape}",
        "(B, 2C, H, W) with C a power of two and H x W a multiple of 4",
    )
    got = (
        f"sample indices {sample_indices.dtype} {tuple(sample_indices.shape)} on "
        f"{sample_indices.device}"
    )
    is_index = sample_indices.dtype == torch.int64 and sample_indices.device == moments.device
    require(
        is_index and sample_indices.shape == shape[:1],
        op,
        got,
        f"int64 {shape[:1]} on {moments.device}",
    )
    is_table = tables[0].dim() == 1 and tables[0].shape == tables[1].shape
    is_table = is_table and all(table.dtype == torch.float32 for table in tables)
    got = " and ".join(f"{table.dtype} {tuple(table.shape)}" for table in tables)
    require(is_table, op, f"tables {got}", "two of float32 and (T,)")
    dense = all(tensor.is_contiguous() for tensor in (moments, sample_indices, *tables))
    require(dense, op, "moments, indices or tables that are not contiguous", "contiguous ones")
    streams = [int(timestep_stream), int(noise_stream), int(moments_stream)]
    # An op's integers are signed; the oracle takes the same 64 bits.
    signed_seed = (seed + 2**63) % 2**64 - 2**63
    options = signed_seed, latent_scale, streams, prediction == "epsilon", dtype
    return diffusion_inputs_forward(moments.detach(), sample_indices, *tables, *options)
