"""What one torch operator launches on a GPU and moves through its memory, from its arguments.

An operator reads each of its tensors once and writes each result once, unless its schema says that
it changes an argument. That is the least that it can do; what a library does inside (split sums,
workspaces, memsets) is not known and not counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from sd_kernels.spec import Matmul
from sd_perf.tools.estimate.eager import convolution_of
from sd_perf.tools.estimate.roofline import AttentionWork

_NO_KERNEL = re.compile(r"(new_)?empty(_like|_strided)?|detach|alias|_unsafe_view|_reshape_alias")
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_"}
"""change their first argument without reading it"""
WAITING = re.compile(r"_local_scalar_dense|(is_)?nonzero|equal|masked_select|bincount|_?unique.*")
"""operators whose result the host must have before it can go on"""
_CHUNK, _BLOCKS, _TENSORS = 65536, 320, 64
"""elements of a block, and most blocks and pairs of tensors of one launch of a `_foreach_` operator
(aten/src/ATen/native/cuda/MultiTensorApply.cuh)"""
_CAT_TENSORS = 128
"""most tensors of one launch of `cat` (aten/src/ATen/native/cuda/Shape.cu)"""


@dataclass(frozen=True)
class Moved:
    """Launches of a kernel, and bytes that they read and write together."""

    launches: int
    read: float
    written: float
    matmul: Matmul | None = None
    attention: AttentionWork | None = None
    name: str = ""
    """where one operator is several kernels: which"""


def size(value: Any) -> float:
    """Bytes of all tensors in `value`; elements that an expanded tensor repeats count once."""
    total = 0
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            steps = zip(leaf.shape, leaf.stride(), strict=True)
            total += math.prod(n for n, stride in steps if stride) * leaf.element_size()
    return float(total)


def moved_by(function: Any, args: Any, kwargs: Any, out: Any) -> list[Moved]:
    """The kernels of one call of an operator; none where it only makes a view or allocates."""
    name = function.overloadpacket.__name__
    if function.is_view or _NO_KERNEL.fullmatch(name) or not size((args, kwargs, out)):
        return []
    if name in ("convolution", "convolution_backward"):
        return _convolution(name, args, out)
    if "attention" in name:
        return [_attention(name, args, out)]
    read, written = _by_schema(function, args, kwargs, out)
    matmul = None
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
        a, b = args[-2:]
        batches = a.shape[0] if a.dim() == 3 else 1
        matmul = Matmul(M=batches * a.shape[-2], N=b.shape[-1], K=a.shape[-1])
    return [Moved(_launches(name, args), read, written, matmul=matmul)]


def _by_schema(function: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, float]:
    """Bytes read and written: arguments, changed arguments, results that are not arguments."""
    read = written = 0.0
    changes = False
    for place, argument in enumerate(function._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            written, changes = written + size(value), True
            is_read = not argument.is_out and function.overloadpacket.__name__ not in _OVERWRITES
        else:
            is_read = True
        read += size(value) if is_read else 0.0
    return read, written if changes else size(out)


def _launches(name: str, args: Any) -> int:
    if name == "cat":
        return math.ceil(len(args[0]) / _CAT_TENSORS)
    if name.startswith("_foreach_"):
        return _foreach_launches([tensor.numel() for tensor in args[0]])
    return 1


def _foreach_launches(sizes: list[int]) -> int:
    """A launch ends when it has its most tensors or blocks; a tensor may go on in the next."""
    launches = tensors = blocks = 0
    for elements in sizes:
        tensors += 1
        for _ in range(math.ceil(elements / _CHUNK)):
            blocks += 1
            if blocks == _BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == _TENSORS:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


def _convolution(name: str, args: Any, out: Any) -> list[Moved]:
    """Forward; or gradient of the input, of the weight and of the bias, as far as asked for."""
    x, weight, y, sizes = convolution_of(name, args, out)
    if name == "convolution":
        return [Moved(1, size((x, weight, args[2])), size(y), matmul=sizes.forward)]
    kernels = []
    for result, other, matmul in (
        (out[0], weight, sizes.grad_input),
        (out[1], x, sizes.grad_weight),
    ):
        if result is not None:
            kind = "dgrad" if other is weight else "wgrad"
            kernels.append(Moved(1, size((y, other)), size(result), matmul=matmul, name=kind))
    if out[2] is not None:
        kernels.append(Moved(1, size(y), size(out[2]), name="bias"))
    return kernels


def _attention(name: str, args: Any, out: Any) -> Moved:
    """One kernel each way. Libraries may launch two more in backward, for sums of rows."""
    is_backward = name.endswith("backward")
    q, k = args[1:3] if is_backward else args[:2]
    matmuls = 5 if is_backward else 2
    flops = 2.0 * matmuls * math.prod(q.shape) * k.shape[2]
    # Seeds of dropout, single numbers on either side, are no traffic.
    read, written = (
        size([leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor) and leaf.dim() > 1])
        for side in (args, out)
    )
    return Moved(1, read, written, attention=AttentionWork(flops, q.shape[2]))


def packed_attention(args: Any, out: Any) -> Moved:
    """The kernel of an op of `sd_kernels.attention.registered`, which a library's function is."""
    first, second = args[:2]
    B, L = first.shape[:2]
    H, D = first.shape[-2:]
    keys = L if second is None else second.shape[1]
    # Forward q k^T and p v; backward the scores again, and the gradients of q, k, v and p.
    matmuls = 2 if len(args) == 2 else 5
    work = AttentionWork(2.0 * matmuls * B * H * L * keys * D, L)
    return Moved(1, size(args), size(out), attention=work)
