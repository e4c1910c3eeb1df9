"""Philox: published vectors, independence of the split, the numbers' distribution."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sd_perf.diffusion.randomness import Stream, normal, philox, philox_4x32, uniform_integers

# Known answers of the Random123 library (kat_vectors, philox4x32 with 10 rounds): counter, key,
# output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox_4x32(key, [torch.tensor(word) for word in counter])
    assert tuple(word.item() for word in words) == expected


def test_seed_index_stream_and_element_all_matter():
    base = philox(1, Stream.NOISE, torch.tensor([5]), 8)
    others = [
        philox(2, Stream.NOISE, torch.tensor([5]), 8),
        philox(1 + 2**32, Stream.NOISE, torch.tensor([5]), 8),
        philox(1, Stream.MOMENTS, torch.tensor([5]), 8),
        philox(1, Stream.NOISE, torch.tensor([6]), 8),
        philox(1, Stream.NOISE, torch.tensor([5 + 2**32]), 8),
    ]
    assert all((base != other).any() for other in others)
    assert base.unique().numel() == 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stream", [Stream.NOISE, Stream.MOMENTS, Stream.SAMPLER])
def test_draws_do_not_depend_on_the_split(world_size, stream):
    indices = torch.arange(100, 112)
    whole = normal(7, stream, indices, 35)
    for rank in range(world_size):
        assert torch.equal(
            normal(7, stream, indices[rank::world_size], 35), whole[rank::world_size]
        )
        assert torch.equal(
            uniform_integers(7, stream, indices[rank::world_size], 1000),
            uniform_integers(7, stream, indices, 1000)[rank::world_size],
        )


def test_more_elements_keep_the_first():
    indices = torch.arange(3)
    assert torch.equal(normal(7, 1, indices, 10)[:, :7], normal(7, 1, indices, 7))


def test_normals_are_normal():
    numbers = normal(3, Stream.NOISE, torch.arange(64), 16384).double()
    n = numbers.numel()
    assert abs(numbers.mean()) < 4 / n**0.5
    assert abs(numbers.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((numbers**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # Neighbours come from one Box-Muller pair, samples from different counters: neither may be
    # correlated.
    for left, right in ((numbers[:, 0::2], numbers[:, 1::2]), (numbers[:-1], numbers[1:])):
        assert abs((left * right).mean()) < 4 / left.numel() ** 0.5


def test_timesteps_cover_their_range_evenly():
    timesteps = uniform_integers(3, Stream.TIMESTEP, torch.arange(200_000), 1000)
    counts = torch.bincount(timesteps, minlength=1000).double()
    assert counts.numel() == 1000
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_squared - 999) < 5 * (2 * 999) ** 0.5


TRITON_PHILOX = """
import torch, triton, triton.language as tl
from sd_perf.diffusion.randomness import philox

@triton.jit
def kernel(out, seed, stream, index_low, index_high, N: tl.constexpr):
    block = tl.arange(0, N)
    zero = tl.zeros([N], tl.int32)
    words = tl.philox(seed, block, zero + stream, zero + index_low, zero + index_high)
    for i in tl.static_range(4):
        tl.store(out + block * 4 + i, words[i].to(tl.uint32, bitcast=True).to(tl.int64))

out = torch.empty(64, dtype=torch.int64)
seed, index = 0x123456789ABCDEF, 6_513_143
kernel[(1,)](out, seed, 1, index & 0xFFFFFFFF, index >> 32, N=16)
assert torch.equal(out, philox(seed, 1, torch.tensor([index]), 64)[0]), out
"""


def test_triton_gives_the_same_words(tmp_path):
    script = tmp_path / "triton_philox.py"  # Triton reads a kernel's source from its file
    script.write_text(TRITON_PHILOX)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=120)
