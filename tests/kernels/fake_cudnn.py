"""A stand-in for nvidia-cudnn-frontend 1.32.0: the calls of its graphs that attention makes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


class _GraphTensor:
    """A tensor of a graph: its shape and strides; a result has none before they are set."""

    def __init__(self, dim: Any = None, stride: Any = None) -> None:
        self.dim, self.stride = dim, stride

    def set_output(self, value: bool) -> _GraphTensor:
        return self

    def set_dim(self, dim: Any) -> _GraphTensor:
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride: Any) -> _GraphTensor:
        self.stride = tuple(stride)
        return self

    def set_data_type(self, data_type: Any) -> _GraphTensor:
        return self


class _Graph:
    """cudnn.pygraph with one attention, computed when it is executed. Heads come before rows."""

    def __init__(
        self,
        name="test_graph",
        io_data_type=None,
        intermediate_data_type=None,
        compute_data_type=None,
        handle=None,
    ) -> None:
        self.is_built = False

    def tensor(self, dim, stride, data_type=None, name=""):
        return _GraphTensor(tuple(dim), tuple(stride))

    def sdpa(self, q, k, v, attn_scale=None, generate_stats=None, name=None):
        assert generate_stats
        self.given, self.scale = (q, k, v), 1.0 if attn_scale is None else attn_scale
        self.results = _GraphTensor(), _GraphTensor()
        return self.results

    def sdpa_backward(
        self,
        q,
        k,
        v,
        o,
        dO,
        stats,
        attn_scale=None,
        use_deterministic_algorithm=False,
        name=None,
    ):
        self.given, self.scale = (q, k, v, dO, o, stats), 1.0 if attn_scale is None else attn_scale
        self.results = _GraphTensor(), _GraphTensor(), _GraphTensor()
        return self.results

    def build(self, heuristics) -> None:
        self.is_built = True

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, pack, workspace, handle=None) -> None:
        assert self.is_built and workspace.numel() == 16 and handle is not None
        assert set(pack) == {*self.given, *self.results}
        for tensor, data in pack.items():
            assert (tensor.dim, tensor.stride) == (tuple(data.shape), data.stride())
        q, k, v, *dout = (pack[tensor].transpose(1, 2) for tensor in self.given[:4])
        if dout:
            made = self.differentiate(q, k, v, *dout, self.scale, causal=False)
        else:
            made = (self.attend(q, k, v, self.scale, causal=False), torch.zeros(()))
        for result, data in zip(self.results, made, strict=True):
            pack[result].copy_(data.transpose(1, 2) if data.dim() else data)


def modules(
    calls: list[dict[str, Any]], plain: Function, gradients: Function
) -> dict[str, types.ModuleType]:
    """The module `cudnn`; the two functions compute attention and its gradients."""
    module: Any = types.ModuleType("cudnn")
    module.data_type = types.SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3, DOUBLE=4)
    module.heur_mode = types.SimpleNamespace(A=1, FALLBACK=2)
    module.create_handle = object

    class pygraph(_Graph):
        attend, differentiate = staticmethod(plain), staticmethod(gradients)

        def build(self, heuristics) -> None:
            super().build(heuristics)
            calls.append({"heuristics": heuristics})

    module.pygraph = pygraph
    return {"cudnn": module}
