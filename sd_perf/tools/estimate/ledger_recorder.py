"""A GPU that is not there, and a record of every kernel that code would launch on it.

`FakeGPU` makes tensors on torch's meta device, which have shapes and no memory, and which say that
they are on `cuda:0`: so the training step takes the way that it takes on a GPU. (torch's own
FakeTensorMode refuses backward passes on a fake GPU unless torch was built for CUDA.) `Recorder`
sees every operator below autograd. For an operator of sd_kernels it runs the real Python code of
the backend, whose Triton launches `sd_kernels.launch.recording` keeps instead of running them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sd_kernels.launch import Launch
from sd_perf.errors import UserError
from sd_perf.tools.estimate.ledger_operators import (
    WAITING,
    Moved,
    moved_by,
    packed_attention,
    size,
)

FORWARD, BACKWARD, REDUCE, OPTIMIZER = PHASES = ("forward", "backward", "reduce", "optimizer")
_OWNER = "sd_kernels operator"
"""key in the metadata of autograd's nodes"""
_DEVICE = torch.Tensor.device.__get__
_FLAT = "sd_perf.training.flat:"
"""begins `Entry.where` of kernels that move gradients to where they are reduced"""
_META = ("meta", torch.device("meta"))
_FROM_HOST = "takes numbers from the host to the GPU or back"
_CUDA = re.compile(r"cuda(:\d+)?")


class WaitingError(UserError):
    """The step waits for the GPU, or copies from or to the host, so that it cannot be captured."""


class FakeGPU(TorchFunctionMode):
    """Tensors made on cuda are on the meta device and answer that they are on cuda:0."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function == _DEVICE:
            device = function(*args)
            return torch.device("cuda", 0) if device.type == "meta" else device
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        named = {name: _on_meta(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_meta, args), **named)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta")
    return "meta" if isinstance(value, str) and _CUDA.fullmatch(value) else value


@dataclass(frozen=True)
class Entry:
    """One kernel of the step, launched once or, for a `_foreach_` operator, several times."""

    op: str
    """the operator of sd_kernels that it belongs to; empty: torch's own, between operators"""
    kernel: str
    """Triton's kernel, or torch's operator"""
    phase: str
    node: str
    """the node of autograd that launched it; empty in forward"""
    where: str
    """the function of this project that called it"""
    moved: Moved
    shape: tuple[int, ...]
    """of its first tensor"""
    inside: bool
    """whether a registered operator of sd_kernels called it"""
    is_triton: bool

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.moved.read + self.moved.written


class Recorder(TorchDispatchMode):
    """Records the kernels of everything that runs in it; `phase` says in which part of the step.

    Raises WaitingError where an operator needs the host.
    """

    def __init__(self, launches: list[Launch]) -> None:
        """`launches` is what `sd_kernels.launch.recording` fills."""
        super().__init__()
        self.entries: list[Entry] = []
        self.phase = FORWARD
        self._launches = launches
        self._owners: list[str] = []
        self._mutated: list[set[int]] = []
        # Storages that were allocated and not written yet: the first launch that has one writes it.
        self._fresh: set[int] = set()

    def owned(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its kernels of both passes recorded as those of the operator `op`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._owners.append(op)
            phase, self.phase = self.phase, OPTIMIZER if op == "adamw" else self.phase
            try:
                results = function(*args, **kwargs)
            finally:
                self._owners.pop()
                self.phase = phase
            before = {leaf.grad_fn for leaf in tree_leaves((args, kwargs)) if _has_node(leaf)}
            _mark(op, [leaf.grad_fn for leaf in tree_leaves(results) if _has_node(leaf)], before)
            return results

        return call

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record what is called within; backward passes are noted as such."""
        with _Calls(self), self:
            yield
            self._flush()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._flush()
        _require_no_waiting(function, args, kwargs)
        if function.namespace == "sd_kernels":
            return self._run(function, args, kwargs)
        out = _channels_last(function, function(*args, **kwargs))
        if "empty" in function.overloadpacket.__name__:
            self._fresh.add(_storage(out))
            return out
        if not function.is_view:
            # Written by this operator; torch may also have given it the address of a freed storage.
            self._fresh -= {_storage(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        for moved in moved_by(function, args, kwargs, out):
            kernel = ".".join(filter(None, (function.overloadpacket.__name__, moved.name)))
            self._add(kernel, moved, (args, out))
        return out

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The Python code of a registered operator, with its launches and torch's own recorded."""
        name = function.overloadpacket.__name__
        definition = OPDEFS[f"sd_kernels::{name}"]
        if name.startswith("attention_"):
            # Its code calls a library that wants a GPU. On fake tensors its shapes suffice: one
            # kernel that reads what it is given and writes what it gives back.
            out = function(*args, **kwargs)
            owner = _owner_of(definition._init_fn)
            self._add(name, packed_attention(args, out), (args, out), owner)
            return out
        values = {
            argument.name: value
            for argument, value in zip(function._schema.arguments, args, strict=False)
        } | kwargs
        changed = (
            values.get(argument.name)
            for argument in function._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        self._owners.append(_owner_of(definition._init_fn) or self._owner())
        self._mutated.append({_storage(tensor) for tensor in changed if tensor is not None})
        try:
            with self:
                out = definition._init_fn(**values)
            self._flush()
        finally:
            self._owners.pop()
            self._mutated.pop()
        return out

    def _flush(self) -> None:
        """Turn the launches of Triton kernels since the last operator into entries."""
        waiting, self._launches[:] = self._launches[:], []
        changed = set().union(*self._mutated)
        for launch in waiting:
            read = written = 0.0
            tensors = [value for value in launch.arguments if isinstance(value, Tensor)]
            for tensor in tensors:
                storage, bytes_ = _storage(tensor), size(tensor)
                is_written = storage in changed or storage in self._fresh
                written += bytes_ if is_written else 0.0
                read += bytes_ if storage in changed or not is_written else 0.0
            self._fresh -= {_storage(tensor) for tensor in tensors}
            function = getattr(launch.kernel, "fn", launch.kernel)
            op = self._owner() or _owner_of(function)
            self._add(function.__name__, Moved(1, read, written), tensors, op, is_triton=True)

    def _owner(self) -> str:
        for owner in self._owners:
            if owner:
                return owner
        node = torch._C._current_autograd_node()
        metadata: Any = {} if node is None else node.metadata
        return metadata.get(_OWNER, "")

    def _add(
        self,
        kernel: str,
        moved: Moved,
        tensors: Any,
        op: str | None = None,
        is_triton: bool = False,
    ) -> None:
        node = torch._C._current_autograd_node()
        first = next((leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)), None)
        where = _where()
        entry = Entry(
            op=self._owner() if op is None else op,
            kernel=kernel,
            # Hooks may collect gradients before the backward pass has ended.
            phase=REDUCE if where.startswith(_FLAT) else self.phase,
            node="" if node is None else node.name(),
            where=where,
            moved=moved,
            shape=() if first is None else tuple(first.shape),
            inside=bool(self._mutated),
            is_triton=is_triton,
        )
        self.entries.append(entry)


class _Calls(TorchFunctionMode):
    """What must be seen above autograd: backward passes, attention, and numbers of the host."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and _on_meta(kwargs.get("device")) in _META:
            raise _waiting("tensor", _FROM_HOST)
        if function is not torch.Tensor.backward:
            return function(*args, **kwargs)
        self.recorder.phase = BACKWARD
        result = function(*args, **kwargs)
        self.recorder.phase = REDUCE
        return result


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The kernel that is enabled; torch would choose its math kernel on the meta device."""
    enabled, aten = torch.backends.cuda, torch.ops.aten
    if enabled.cudnn_sdp_enabled():
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[0]
    if enabled.flash_sdp_enabled():
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if enabled.mem_efficient_sdp_enabled():
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _has_node(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.grad_fn is not None


def _mark(op: str, nodes: list[Any], before: set[Any]) -> None:
    """Note in the nodes that made an operator's results, up to its arguments, whose they are."""
    while nodes:
        node = nodes.pop()
        if node is None or node in before or _OWNER in node.metadata:
            continue
        node.metadata[_OWNER] = op
        nodes += [following for following, _ in node.next_functions]


def _owner_of(function: Any) -> str:
    """group_norm of a function in sd_kernels.group_norm.forward; empty for what ops share."""
    parts = function.__module__.split(".")
    return parts[1] if len(parts) > 2 else ""


def _where() -> str:
    """The innermost function of this project that is running, but for this tool's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("sd_perf.", "sd_kernels.")) and ".ledger" not in module:
            return f"{module}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return ""


def _channels_last(function: Any, out: Any) -> Any:
    """Results of convolutions in the memory order of cuDNN; meta tensors have torch's default."""
    if "convolution" not in function.overloadpacket.__name__:
        return out
    return tree_map(
        lambda x: (
            torch.empty_like(x, memory_format=torch.channels_last)
            if isinstance(x, Tensor) and x.dim() == 4
            else x
        ),
        out,
    )


def _require_no_waiting(function: Any, args: Any, kwargs: Any) -> None:
    """WaitingError for an operator that a captured step may not have."""
    name = function.overloadpacket.__name__
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {"cuda" if leaf.is_meta else "cpu" for leaf in leaves}
    if leaves and kwargs.get("device") is not None:
        devices.add("cuda" if torch.device(kwargs["device"]).type == "meta" else "cpu")
    if "cuda" not in devices:
        return
    indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor)]
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in indices)
    if WAITING.fullmatch(name) or by_mask or function == torch.ops.aten.repeat_interleave.Tensor:
        raise _waiting(name, "makes the host wait for the GPU")
    if len(devices) > 1:
        raise _waiting(name, _FROM_HOST)


def _waiting(name: str, why: str) -> WaitingError:
    return WaitingError(
        f"aten.{name} in {_where()} {why}, which a captured training step may not; keep the number "
        "in a tensor on the GPU"
    )
