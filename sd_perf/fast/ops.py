"""The operators of a fast training step, each by the backend that was chosen for it.

Kernels are chosen once, when a run is launched (`fast.choice`). The `Ops` made of the choices are
handed to the network, the diffusion step and the optimizer. Code that counts or profiles calls
wraps these functions; it does not choose again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sd_kernels.selection import Choice

Op = Callable[..., Any]
Wrap = Callable[[str, Op], Op]
"""returns the function to call instead of an operator, from the operator's name and function"""


class Ops:
    """Functions by operator name: `ops.group_norm(x, weight, bias, ...)`.

    An operator is an attribute because its folder `kernels/sd_kernels/<name>` exists.
    """

    def __init__(self, functions: Mapping[str, Op]) -> None:
        self.__dict__.update(functions)

    @classmethod
    def chosen(cls, choices: Mapping[str, Choice], wrap: Wrap | None = None) -> Ops:
        """The functions of the chosen backends; `wrap` is called once for every operator."""
        functions = {name: choice.function() for name, choice in choices.items()}
        return cls(functions).wrapped(wrap) if wrap else cls(functions)

    def wrapped(self, wrap: Wrap) -> Ops:
        """The same operators, each replaced by `wrap(name, function)`."""
        return Ops({name: wrap(name, function) for name, function in vars(self).items()})

    def __getattr__(self, name: str) -> Op:  # only for names that are not there
        raise AttributeError(
            f"no operator {name!r} was chosen; a folder kernels/sd_kernels/{name} would make it one"
        )


def with_weights_cast(ops: Ops) -> Ops:
    """The operators for float32 weights: each casts its other tensors to the dtype of its first.

    `upsample_conv` is left alone. It merges its weights first and rounds the merged ones once.
    """
    return ops.wrapped(lambda name, op: op if name == "upsample_conv" else _casting(op))


def _casting(op: Op) -> Op:
    def call(x: Tensor, *others: Tensor | None, **options: Any) -> Any:
        cast = (other if other is None else other.to(x.dtype) for other in others)
        return op(x, *cast, **options)

    return call
