"""A network's parameters as views into one flat buffer.

With one buffer the optimizer is one kernel launch and the gradient mean one collective, instead of
hundreds. Each parameter keeps its name, shape and memory order (channels-last stays so), so the
network's state dict does not change. In bfloat16 the buffer holds the upper halves of float32
masters and a second buffer the lower halves: see `sd_kernels.adamw.reference.split_master`.

Shape letter: N elements of a buffer, the parameters' and the padding between them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_kernels.adamw.reference import join_master, split_master

ALIGNMENT = 64
"""elements: every parameter begins at a multiple of 128 bytes in bfloat16, so that kernels can load
16 bytes per thread and a warp's loads fill whole cache lines"""


class FlatParameters:
    """The parameters of `module` as views into `weights` (N,); their values become the masters.

    The padding between two parameters is zero in every buffer, and AdamW leaves it zero. A later
    `module.to(...)` would move the parameters out again; `collect_gradients` then raises.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        """`dtype` is bfloat16, with 16-bit `remainders`, or float32, without them.

        ValueError unless all parameters are float32 and dense.
        """
        self._parameters = dict(module.named_parameters())
        self._offsets, size = {}, 0
        for name, parameter in self._parameters.items():
            _require_dense(name, parameter)
            self._offsets[name] = size
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(self._parameters.values())).device
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.weights)
        split = dtype == torch.bfloat16
        self.remainders = torch.zeros(size, dtype=torch.int16, device=device) if split else None
        masters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        for name, view in self.views(self.weights).items():
            self._parameters[name].data = view
        self.set_masters(masters)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer (N,) by parameter name, in the parameters' shapes and memory order."""
        return {
            name: buffer.as_strided(parameter.shape, parameter.stride(), self._offsets[name])
            for name, parameter in self._parameters.items()
        }

    def masters(self) -> dict[str, Tensor]:
        """Copies of the float32 weights that AdamW updates, by parameter name."""
        weights = self.views(self.weights)
        if self.remainders is None:
            return {name: weight.clone() for name, weight in weights.items()}
        return {
            name: join_master(weights[name], rest)
            for name, rest in self.views(self.remainders).items()
        }

    def set_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Set weights, and remainders if any, from float32 tensors by parameter name."""
        if masters.keys() != self._parameters.keys():
            unlike = sorted(masters.keys() ^ self._parameters.keys())
            raise ValueError(
                f"masters must be of the network's own parameters; {unlike[0]!r} is on one side "
                "only"
            )
        weights = self.views(self.weights)
        if self.remainders is None:
            for name, master in masters.items():
                weights[name].copy_(master)
            return
        remainders = self.views(self.remainders)
        for name, master in masters.items():
            upper, lower = split_master(master.detach().to(self.weights.device, torch.float32))
            weights[name].copy_(upper)
            remainders[name].copy_(lower)

    def collect_gradients(self) -> Tensor:
        """Move every parameter's gradient into `grads` (N,), and return that buffer.

        The parameters have no gradient afterwards. If their gradients were views into `grads`,
        autograd would add to them, which costs more: zeroing writes them, adding reads two tensors
        and writes one, in bfloat16 8 bytes a parameter in hundreds of launches. A gradient that
        starts from None is the tensor that autograd made; copying it moves 4, in few launches.
        """
        alike: list[tuple[Tensor, Tensor]] = []
        begin, width = self.weights.data_ptr(), self.weights.element_size()
        for name, parameter in self._parameters.items():
            offset, gradient = self._offsets[name], parameter.grad
            if (
                parameter.data_ptr() != begin + offset * width
                or parameter.dtype != self.weights.dtype
            ):
                raise RuntimeError(f"{name} has left the flat buffer, so AdamW would not update it")
            if gradient is None:
                raise RuntimeError(
                    f"{name} has no gradient; every parameter must take part in the loss"
                )
            target = self.grads.as_strided(parameter.shape, parameter.stride(), offset)
            if _order(gradient) == _order(target):
                # As rows of memory: torch copies all in few launches only if every pair has the
                # very same strides.
                alike.append((_in_memory_order(target), _in_memory_order(gradient)))
            else:
                target.copy_(gradient)
            parameter.grad = None
        torch._foreach_copy_([target for target, _ in alike], [gradient for _, gradient in alike])
        return self.grads


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


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))
