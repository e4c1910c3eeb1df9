"""What plain eager PyTorch does in a training step: every kernel of the reference UNet, recorded on
the meta device.

CUDA autocast is played on meta tensors, where torch has none: products in bfloat16, norms in
float32. An operator is counted as reading its tensors once and writing its results once, which is
the least that it can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd_perf.config import Config
from sd_perf.reference.unet import UNet
from sd_perf.tools.estimate.kernels import Kernel, Product

_IN_BFLOAT16 = {torch.conv2d, F.conv2d, F.linear, F.scaled_dot_product_attention}
_IN_FLOAT32 = {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm}
_NAMES = {
    "native_group_norm": "group_norm",
    "silu": "group_norm",
    "native_layer_norm": "layer_norm",
}
_NAMES |= {"gelu": "geglu", "mul": "geglu"}
_PASSES = {
    "native_group_norm": 3 / 2,
    "native_group_norm_backward": 5 / 3,
    "native_layer_norm_backward": 5 / 3,
}
"""over large tensors, where torch's kernels make more than one reading each takes
(aten/src/ATen/native/cuda)"""
_NO_KERNEL = {"empty", "detach", "_unsafe_view", "lift_fresh", "zeros_like", "ones_like"}


class _Autocast(TorchFunctionMode):
    """Casts as torch.autocast("cuda") does; a weight once per step. Attention by its fused
    kernel."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.weights: dict[int, torch.Tensor] = {}
        self.casts = {torch.bfloat16: _IN_BFLOAT16, torch.float32: _IN_FLOAT32} if enabled else {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
            or value.dtype == dtype
        ):
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.to(dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(dtype)
        return self.weights[id(value)]

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for dtype, functions in self.casts.items():
            if function in functions:
                args = [self.cast(value, dtype) for value in args]
                kwargs = {name: self.cast(value, dtype) for name, value in (kwargs or {}).items()}
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return function(*args, **(kwargs or {}))


def _bytes(values: Any) -> int:
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    )


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.backward = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _NO_KERNEL:
            made = self._kernels(name, args, out)
            self.kernels += [replace(kernel, backward=self.backward) for kernel in made]
        return out

    def _kernels(self, name: str, args: Any, out: Any) -> Iterator[Kernel]:
        moved = _bytes((args, out))
        if name in ("convolution", "convolution_backward"):
            yield from self._convolution(name, args, out)
        elif name in ("mm", "addmm"):
            a, b = args[-2:]
            yield Kernel("linear", moved, product=Product(a.shape[0], b.shape[1], a.shape[1]))
        elif "attention" in name:
            backward = name.endswith("backward")
            q, k = args[1:3] if backward else args[:2]
            flops = (10.0 if backward else 4.0) * math.prod(q.shape) * k.shape[2]
            yield Kernel("attention", moved, attention=(flops, q.shape[2]))
        else:
            short = name.removesuffix("_").removesuffix("_backward")
            yield Kernel(_NAMES.get(short, "elementwise"), moved * _PASSES.get(name, 1.0))

    def _convolution(self, name: str, args: Any, out: Any) -> Iterator[Kernel]:
        """The product or products, what turns NCHW images to the NHWC of the tensor cores and back,
        and the bias."""
        forward = name == "convolution"
        x, weight, y = (args[0], args[1], out) if forward else (args[1], args[2], args[0])
        outputs, channels, *taps = weight.shape
        pixels, area = y.numel() // outputs, math.prod(taps)
        products = [Product(pixels, outputs, area * channels)]
        if not forward:
            inner = pixels * outputs * area * channels // x.numel()
            products = (
                [Product(x.numel() // channels, channels, inner)] if out[0] is not None else []
            )
            products.append(Product(outputs, area * channels, pixels))
        for product in products:
            yield Kernel("conv" if area > 1 else "skip_conv", _bytes((x, weight, y)), product)
            yield Kernel("elementwise", 2.0 * _bytes((x, y)))
        yield Kernel("elementwise", (1.0 + forward) * _bytes(y))


def recorded(forward: Callable[[], Any], autocast: bool = True) -> tuple[list[Kernel], float]:
    """Kernels of a forward pass on the meta device and of its backward, and the bytes that the one
    keeps for the other.

    The gradients of what `forward` gives are there; they are neither made nor counted.
    """
    recorder, casts, kept = _Recorder(), _Autocast(autocast), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casts, recorder:
        outputs = tree_leaves(forward())
    recorder.backward = True
    gradients = [
        torch.ones_like(output, memory_format=torch.contiguous_format) for output in outputs
    ]
    with recorder:
        torch.autograd.backward(outputs, gradients)
    for weight in casts.weights.values():
        kept.pop(id(weight), None)
    return recorder.kernels, float(_bytes(list(kept.values())))


def plain(config: Config, batch: int, autocast: bool = True) -> tuple[list[Kernel], float]:
    """`recorded` for the whole network and a loss, of so many samples."""
    with torch.device("meta"):
        unet = UNet(config.model)
        size, channels = config.data.latent_size, config.model.in_channels
        latents = torch.empty(batch, channels, size, size)
        context = torch.empty(batch, config.data.context_tokens, config.model.context_dim)
        timesteps = torch.zeros(batch, dtype=torch.int64)
    return recorded(lambda: unet(latents, timesteps, context).float().square().mean(), autocast)
