"""Kernels that the ahead-of-time check must see through; run as a script: prints what it says of
each, as JSON.

Not imported by tests: it must run without Triton's interpreter, which the tests' own process has
chosen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import ahead_of_time
from sd_kernels.launch import Launch

N = 1024


@triton.jit
def wide(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + 1)


@triton.jit
def narrow_store(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + 3 * i, value)


@triton.jit
def narrow_masked_loads(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    one = tl.load(x + 3 * i, mask=i < N - 1, other=1.0)
    two = tl.load(x + 5 * i + N, mask=i < N - 2, other=2.0)  # narrow: excuses only this line
    tl.store(y + i, one + two)


@triton.jit
def explained(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + 3 * i, mask=i < N - 1, other=1.0)  # narrow: every third element

    tl.store(y + 3 * i, value)  # narrow: every third element


@triton.jit
def _store_thirds_explained(y, value, N: tl.constexpr):
    tl.store(y + 3 * tl.arange(0, N), value)  # narrow: every third element


@triton.jit
def _store_thirds(y, value, N: tl.constexpr):
    tl.store(y + 3 * tl.arange(0, N), value)


@triton.jit
def explained_in_a_helper(x, y, N: tl.constexpr):
    _store_thirds_explained(y, tl.load(x + tl.arange(0, N)), N)


@triton.jit
def explained_by_the_caller_of_a_helper(x, y, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    _store_thirds(y, value, N)  # narrow: of no avail, the access is elsewhere


@triton.jit
def too_many_registers(x, y, N: tl.constexpr):
    i = tl.arange(0, 64 * N)
    value = tl.load(x + i).to(tl.float32)
    scaled = value * tl.sum(value) + tl.max(value)
    tl.store(y + i, scaled * tl.sum(scaled))


@triton.jit
def product_without_tensor_cores(x, y, N: tl.constexpr):
    i = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + i).to(tl.float32)
    tl.store(y + i, tl.dot(a, a, input_precision="ieee"))


@triton.jit
def product(x, y, N: tl.constexpr):
    i = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + i)
    tl.store(y + i, tl.dot(a, a))


def judged(kernel: Any, capability: int) -> dict[str, Any]:
    """The check's row for one kernel, with its verdict."""
    arguments = torch.empty(64 * N, dtype=torch.bfloat16), torch.empty(64 * N, dtype=torch.bfloat16)
    launch = Launch(kernel, (1,), arguments, {"N": N, "enable_fp_fusion": True})
    _, source, options = ahead_of_time.compile_for(launch, capability)
    row = ahead_of_time.inspect("fault", "", launch, source, options, capability)
    return {"ok": row.ok, **asdict(row)}


def main() -> None:
    """Judge every kernel of this file for the compute capability that is given."""
    kernels: list[Callable[..., None]] = [wide, narrow_store, narrow_masked_loads, explained]
    kernels += [explained_in_a_helper, explained_by_the_caller_of_a_helper]
    kernels += [too_many_registers, product_without_tensor_cores, product]
    print(json.dumps({kernel.__name__: judged(kernel, int(sys.argv[1])) for kernel in kernels}))


if __name__ == "__main__":
    main()
