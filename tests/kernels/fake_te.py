"""A stand-in for Transformer Engine on a CPU: its signatures and rules of scaling.

The arithmetic is that of `fp8_linear.reference`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sd_kernels.fp8_linear.reference import FORMATS, FORWARD
from sd_kernels.fp8_linear.reference import fp8_linear as reference

LENGTH = 16
"""steps in a history"""


class State:
    """The state that Transformer Engine keeps for the whole process."""

    def __init__(self) -> None:
        self.depth = 0
        self.recipe: Any = None
        self.rows = 0
        self.seen: list[Linear] = []
        """layers that have run with delayed scaling, in the order of their first run"""
        self.updates = 0
        """how often the histories of all of them were moved on"""


state = State()


class Linear(torch.nn.Module):
    """te.Linear; with delayed scaling, the E4M3 scale comes from earlier steps."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: Any = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        place = {"dtype": params_dtype, "device": "meta" if device == "meta" else "cpu"}
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, **place))
        self.bias = torch.nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.scales = torch.cat([torch.ones(1), torch.zeros(LENGTH)])
        """the scale and the history of magnitudes"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert state.depth > 0
        assert x.shape[0] % 8 == 0
        state.rows = x.shape[0]
        if "amax_history_len" in state.recipe:
            x = x + (self._rounded(x.detach()) - x.detach())
        return reference(x, self.weight, self.bias)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self not in state.seen:
            state.seen.append(self)
        self.scales[1] = torch.maximum(self.scales[1], x.abs().max().float())
        largest, scale = FORMATS[FORWARD], self.scales[0].clone()
        return ((x.float() * scale).clamp(-largest, largest).to(FORWARD).float() / scale).to(
            x.dtype
        )

    def move_on(self) -> None:
        """Take the scale from the history, and drop the oldest step of the history."""
        amax = self.scales[1:].max()
        self.scales[0] = torch.where(amax > 0, FORMATS[FORWARD] / amax, self.scales[0])
        self.scales[1:] = torch.cat([torch.zeros(1), self.scales[1:-1]])

    def get_extra_state(self) -> torch.Tensor:
        return (self.scales if self in state.seen else torch.empty(0)).clone().view(torch.uint8)

    def set_extra_state(self, bytes_: torch.Tensor) -> None:
        if bytes_.numel() > 0:
            self.scales.copy_(bytes_.view(torch.float32))
            state.seen += [] if self in state.seen else [self]

    def reset_fp8_meta_tensors(self) -> None:
        self.scales.copy_(torch.cat([torch.ones(1), torch.zeros(LENGTH)]))


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Any = None,
    amax_reduction_group: Any = None,
) -> Iterator[None]:
    """te.autocast; on leaving the outermost one, the histories of all layers move on by a step."""
    outer, state.recipe = state.recipe, recipe
    state.depth += 1
    yield
    state.depth -= 1
    state.recipe = outer
    if state.depth == 0 and torch.is_grad_enabled() and state.seen:
        state.updates += 1
        for layer in state.seen:
            layer.move_on()


def modules() -> dict[str, types.ModuleType]:
    """The modules of the stand-in by import name, with the state of a new process."""
    state.__init__()  # type: ignore[misc]
    names = "transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"
    made = {name: types.ModuleType(name) for name in (*names, "transformer_engine.common.recipe")}
    vars(made["transformer_engine.pytorch"]).update(Linear=Linear, autocast=autocast)
    recipe = {
        "DelayedScaling": dict,
        "Float8CurrentScaling": dict,
        "Format": types.SimpleNamespace(HYBRID="hybrid"),
    }
    vars(made["transformer_engine.common.recipe"]).update(recipe)
    vars(made["transformer_engine"]).update(pytorch=made["transformer_engine.pytorch"])
    return made
