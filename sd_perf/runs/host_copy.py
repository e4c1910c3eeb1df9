"""Copies of device tensors in host memory that is allocated once and used again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK = 2**30
"""bytes allocated at once; torch rounds page-locked allocations up to a power of two"""
_ALIGNMENT = 64


class HostCopy:
    """Takes copies of tensors, one set at a time; `wait` until they may be read.

    From a GPU they are made on a stream of their own into page-locked memory. Work that is queued
    on the current stream later waits for the copies alone, not for what the host then does.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._sources: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate for tensors of these names, shapes, strides and dtypes."""
        if {name: _kind(tensor) for name, tensor in tensors.items()} != {
            name: _kind(buffer) for name, buffer in self._buffers.items()
        }:
            self._buffers = _allocate(tensors)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy; returns the copies by name, dense as the tensors are.

        They are overwritten by the next call.
        """
        self.reserve(tensors)
        cuda = any(tensor.is_cuda for tensor in tensors.values())
        if not cuda:
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor.detach())
            return dict(self._buffers)
        self._stream = self._stream or torch.cuda.Stream()
        self._done = torch.cuda.Event()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor.detach(), non_blocking=True)
            self._done.record()
        current.wait_event(self._done)
        # Tensors made for this copy alone must not be freed before it has read them.
        self._sources = dict(tensors)
        return dict(self._buffers)

    def wait(self) -> None:
        """Return when the copies are complete."""
        if self._done:
            self._done.synchronize()
        self._sources = {}


def _kind(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _allocate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Host tensors of the same shapes, strides and dtypes, many in one allocation."""
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    buffers: dict[str, Tensor] = {}
    chunk, begin = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if begin + size > len(chunk):
            length = max(_CHUNK, size) if pinned else size
            chunk, begin = torch.empty(length, dtype=torch.uint8, pin_memory=pinned), 0
        flat = chunk[begin : begin + size].view(tensor.dtype)
        buffers[name] = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
        begin += -(-size // _ALIGNMENT) * _ALIGNMENT
    return buffers
