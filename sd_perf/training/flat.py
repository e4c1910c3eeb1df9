"""A network's parameters as views into one flat buffer.

With one buffer the optimizer is one kernel launch and the gradient mean one collective, instead of
hundreds. Each parameter keeps its name, shape and memory order (channels-last stays so), so the
network's state dict does not change.

In bfloat16 the buffer holds the upper halves of float32 masters, a second buffer the lower halves:
see `sd_kernels.adamw.reference.split_master`.

The buffer is divided into buckets, in the order in which the network uses its parameters. A
backward pass completes the last bucket first, so its gradients can be exchanged while the others
are still being computed. Where the optimizer's state is divided over ranks, each rank keeps an
equal share of every bucket: remainders and moments are buffers (M,) that hold this rank's shares,
one behind the other.

Shape letters: N elements of a buffer, the parameters' and the padding between them; M elements of
this rank's shares, N where nothing is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_kernels.adamw.reference import join_master, split_master

ALIGNMENT = 64
"""elements: every parameter begins at a multiple of 128 bytes in bfloat16, so that kernels can load
16 bytes per thread and a warp's loads fill whole cache lines"""


@dataclass(frozen=True)
class Bucket:
    """The elements [begin, end) of a flat buffer, which are collected and exchanged together."""

    begin: int
    end: int
    names: tuple[str, ...]
    """parameters that lie in it, in order"""
    share: slice
    """this rank's share, within [begin, end)"""
    local: slice
    """where that share lies in a buffer (M,)"""

    @property
    def all(self) -> slice:
        """All its elements."""
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class Part:
    """What a buffer (M,) holds of one parameter: its elements from `begin` on, in memory order."""

    values: Tensor
    begin: int


class FlatParameters:
    """The parameters of `module` as views into `weights` (N,), which take their values.

    The padding between two parameters is zero in every buffer, and AdamW leaves it zero. A later
    `module.to(...)` would move the parameters out again; `collect` then raises.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        dtype: torch.dtype,
        *,
        grads_dtype: torch.dtype | None = None,
        order: Iterable[str] | None = None,
        buckets: int = 1,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Weights are bfloat16, with 16-bit `remainders`, or float32, without them.

        `grads_dtype` is that of the gradients (None: the weights'). `order` are the names of all
        parameters as they are to lie in memory (None: the module's). `share` is (rank, ranks):
        which part of remainders and moments is kept here, of how many. ValueError unless all
        parameters are float32 and dense, and `order` names each once.
        """
        named = dict(module.named_parameters())
        names = list(named if order is None else order)
        if sorted(names) != sorted(named):
            unlike = sorted(set(names) ^ set(named)) or names
            raise ValueError(f"the order must name every parameter once; see {unlike[0]!r}")
        self.parameters = {name: named[name] for name in names}
        for name, parameter in self.parameters.items():
            _require_dense(name, parameter)
        self.offsets, self.buckets = _layout(self.parameters, buckets, *share)
        size, device = self.buckets[-1].end, next(iter(self.parameters.values())).device
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.grads = torch.zeros(size, dtype=grads_dtype or dtype, device=device)
        split = dtype == torch.bfloat16
        self.remainders = self.local_buffer(torch.int16) if split else None
        masters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, view in self.views(self.weights).items():
            self.parameters[name].data = view
        self.set_masters(masters)

    def local_buffer(self, dtype: torch.dtype) -> Tensor:
        """A buffer (M,) of zeros."""
        size = self.buckets[-1].local.stop
        return torch.zeros(size, dtype=dtype, device=self.weights.device)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer (N,) by parameter name, in the parameters' shapes and memory order."""
        views = {}
        for name, parameter in self.parameters.items():
            begin = self.offsets[name]
            elements = buffer[begin : begin + parameter.numel()]
            views[name] = elements.as_strided(parameter.shape, parameter.stride())
        return views

    def parts(self, local: Tensor) -> dict[str, Part]:
        """What a buffer (M,) holds of each parameter, by name; parameters held elsewhere are left
        out."""
        parts = {}
        for bucket in self.buckets:
            for name in bucket.names:
                offset = self.offsets[name]
                begin = max(offset, bucket.share.start)
                end = min(offset + self.parameters[name].numel(), bucket.share.stop)
                if begin < end:
                    shift = bucket.local.start - bucket.share.start
                    parts[name] = Part(local[begin + shift : end + shift], begin - offset)
        return parts

    def masters(self) -> Tensor:
        """The float32 weights that AdamW updates on this rank (M,), a copy."""
        shares = torch.cat(self.shares())
        return shares if self.remainders is None else join_master(shares, self.remainders)

    def shares(self) -> list[Tensor]:
        """This rank's shares of the weights, one for each bucket; not copied."""
        return [self.weights[bucket.share] for bucket in self.buckets]

    def set_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Set all weights, and this rank's remainders, from whole float32 tensors by name."""
        if masters.keys() != self.parameters.keys():
            unlike = sorted(masters.keys() ^ self.parameters.keys())
            raise ValueError(
                f"masters must be of the network's own parameters; {unlike[0]!r} is on one side "
                "only"
            )
        weights = self.views(self.weights)
        lower = {} if self.remainders is None else self.parts(self.remainders)
        for name, master in masters.items():
            view = weights[name]
            exact = torch.empty_like(view, dtype=torch.float32).copy_(master)
            if self.remainders is None:
                view.copy_(exact)
                continue
            upper, rest = split_master(exact)
            view.copy_(upper)
            if name in lower:
                fill_part(lower[name], rest)

    def collect(self, bucket: Bucket, *, add: bool = False, besides: Collection[str] = ()) -> None:
        """Move the gradients of a bucket's parameters into `grads`, or add them to what is there.

        `besides` are names of parameters whose gradients are there already.
        The parameters have no gradient afterwards. If their gradients were views into `grads`,
        autograd would add to them, which costs more: zeroing writes them, adding reads two tensors
        and writes one, in bfloat16 8 bytes a parameter in hundreds of launches. A gradient that
        starts from None is the tensor that autograd made; copying it moves 4, in few launches.
        """
        targets, sources = [], []
        for name in bucket.names:
            self._require_here(name)
            if name in besides:
                if self.parameters[name].grad is not None:
                    raise RuntimeError(
                        f"{name}: has a second gradient beside the one in the buffer"
                    )
                continue
            begin, gradient = self.offsets[name], self._gradient(name)
            # As rows of memory: torch takes all in few launches only if every pair has the very
            # same strides. Autograd makes gradients in the memory order of their parameters.
            targets.append(self.grads[begin : begin + gradient.numel()])
            sources.append(in_memory_order(gradient))
            self.parameters[name].grad = None
        if not targets:
            return
        if add:
            torch._foreach_add_(targets, sources)
        else:
            torch._foreach_copy_(targets, sources)

    def _require_here(self, name: str) -> None:
        parameter = self.parameters[name]
        address = self.weights.data_ptr() + self.offsets[name] * self.weights.element_size()
        if parameter.data_ptr() != address or parameter.dtype != self.weights.dtype:
            raise RuntimeError(f"{name} has left the flat buffer, so AdamW would not update it")

    def _gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        if parameter.grad is None:
            raise RuntimeError(
                f"{name} has no gradient; every parameter must take part in the loss"
            )
        if _order(parameter.grad) != _order(parameter):
            raise RuntimeError(f"{name} has a gradient in another memory order than its own")
        return parameter.grad


def _layout(
    parameters: Mapping[str, Tensor], buckets: int, rank: int, ranks: int
) -> tuple[dict[str, int], tuple[Bucket, ...]]:
    """Offset of every parameter, and the buckets: as even as whole parameters allow.

    A bucket is padded so that every rank's share is a multiple of ALIGNMENT.
    """
    sizes = {name: _padded(tensor.numel(), ALIGNMENT) for name, tensor in parameters.items()}
    even = -(-sum(sizes.values()) // buckets)
    offsets: dict[str, int] = {}
    done: list[Bucket] = []
    begin, end, taken, names = 0, 0, 0, []
    for position, (name, size) in enumerate(sizes.items(), start=1):
        offsets[name] = end
        end, taken = end + size, taken + size
        names.append(name)
        if taken >= even * (len(done) + 1) or position == len(sizes):
            end = begin + _padded(end - begin, ALIGNMENT * ranks)
            size, local = (end - begin) // ranks, begin // ranks
            share = slice(begin + rank * size, begin + (rank + 1) * size)
            done.append(Bucket(begin, end, tuple(names), share, slice(local, local + size)))
            begin, names = end, []
    return offsets, tuple(done)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def fill_part(part: Part, whole: Tensor) -> None:
    """Fill a part from the whole tensor, whose memory order is the parameter's."""
    end = part.begin + part.values.numel()
    part.values.copy_(in_memory_order(whole)[part.begin : end])


def _require_dense(name: str, parameter: Tensor) -> None:
    """ValueError for a parameter that is not float32, or whose elements do not fill its memory."""
    reach = 1 + sum(
        (size - 1) * stride
        for size, stride in zip(parameter.shape, parameter.stride(), strict=True)
    )
    if parameter.dtype != torch.float32 or reach != parameter.numel():
        got = f"{parameter.dtype}, shape {tuple(parameter.shape)}, strides {parameter.stride()}"
        raise ValueError(
            f"{name}: {got} cannot be made flat; it must be float32 and fill its memory"
        )


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of every axis with more than one element: where the elements lie."""
    return [
        (size, stride)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    ]


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))
