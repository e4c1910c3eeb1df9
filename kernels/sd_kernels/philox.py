"""Counter-based random numbers: a draw depends on (seed, sample index, stream, element) alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is
the 64-bit seed. The counter is (element // 4, stream, sample index low, sample index high). Rank,
batch size and world size never enter: any split of the same samples sees the same draws, and a
captured graph needs no generator. Triton's `tl.philox` gives the same words for the same key and
counter.

Shape letters: B samples, N numbers of a sample.
"""

from __future__ import annotations

import math

import torch

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32 bit product, whose 64 bits int64 holds, though as signed."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32(key: tuple[int, int], counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10: four words from a key and a counter of four words.

    Words are int64 tensors that hold uint32; the shapes of the counter's words must broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return [c0, c1, c2, c3]


def philox(seed: int, stream: int, indices: torch.Tensor, num_words: int) -> torch.Tensor:
    """Random words (B, num_words), int64 holding uint32, of the samples `indices` (B,) int64.

    They are on the device of `indices`.
    """
    blocks = torch.arange(-(-num_words // 4), dtype=torch.int64, device=indices.device)
    index = indices[:, None]
    counter = [
        blocks[None, :],
        torch.full_like(blocks[None, :], stream),
        index & _WORD,
        (index >> 32) & _WORD,
    ]
    words = philox_4x32((seed & _WORD, (seed >> 32) & _WORD), counter)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :num_words]


def normal(seed: int, stream: int, indices: torch.Tensor, num: int) -> torch.Tensor:
    """Standard normals (B, num) float32; words 2i and 2i + 1 give numbers 2i and 2i + 1.

    Box and Muller, "A Note on the Generation of Random Normal Deviates" (1958). The uniform numbers
    have 24 bits, so that they are exact in float32 on every device. Logarithm, root, sine and
    cosine are computed in float64, so that the rounded result does not depend on how a device
    vectorises them.
    """
    words = philox(seed, stream, indices, num + num % 2)
    first, second = (words >> 8).to(torch.float64).unflatten(1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log((first + 1.0) * 2.0**-24))
    angle = second * (2.0 * math.pi * 2.0**-24)
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pair.flatten(1)[:, :num].to(torch.float32)


def uniform_integers(seed: int, stream: int, indices: torch.Tensor, high: int) -> torch.Tensor:
    """One integer in [0, high) for each sample, (B,) int64: the high word of word * high."""
    return (philox(seed, stream, indices, 1)[:, 0] * high) >> 32
