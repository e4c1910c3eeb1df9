"""The kernels of a plain eager PyTorch step, recorded from the reference UNet on the meta device.

torch has no autocast for meta tensors, so CUDA's is imitated: matmuls in bfloat16, norms in
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
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd_kernels.spec import Matmul, Matmuls
from sd_perf.config import Config
from sd_perf.reference.unet import UNet
from sd_perf.tools.estimate.roofline import AttentionWork, Kernel

# As torch's documentation of autocast lists the operators ("CUDA Op-Specific Behavior").
_IN_BFLOAT16 = {torch.conv2d, F.conv2d, F.linear, F.scaled_dot_product_attention}
_IN_FLOAT32 = {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm}
# The op of sd_kernels that does an operator's work, so that both stand in one row.
_NAMES = {
    "native_group_norm": "group_norm",
    "silu": "group_norm",
    "native_layer_norm": "layer_norm",
    "gelu": "geglu",
    "mul": "geglu",
}
_PASSES = {
    "native_group_norm": 3 / 2,
    "native_group_norm_backward": 5 / 3,
    "native_layer_norm_backward": 5 / 3,
}
"""bytes that torch's norms really move, against one reading and one writing: they read a large
tensor again after its statistics (aten/src/ATen/native/cuda)"""
_NO_KERNEL = {"empty", "detach", "_unsafe_view", "lift_fresh", "zeros_like", "ones_like"}


class _Autocast(TorchFunctionMode):
    """Casts as torch.autocast("cuda") does, each weight once per step.

    Attention runs by its fused kernel.
    """

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
        # As autocast's cache does, which lives until the step ends.
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
        # On meta tensors torch would take the math kernel, which keeps the scores.
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
            matmul = Matmul(M=a.shape[0], N=b.shape[1], K=a.shape[1])
            yield Kernel("linear", moved, matmul=matmul)
        elif "attention" in name:
            backward = name.endswith("backward")
            q, k = args[1:3] if backward else args[:2]
            # Forward multiplies q k^T, then the scores with v; backward computes the scores again
            # and has four more matmuls. Each takes 2 * B * H * L * T * D.
            matmuls = 5 if backward else 2
            flops = 2.0 * matmuls * math.prod(q.shape) * k.shape[2]
            work = AttentionWork(flops, queries=q.shape[2])
            yield Kernel("attention", moved, attention=work)
        else:
            short = name.removesuffix("_").removesuffix("_backward")
            yield Kernel(_NAMES.get(short, "elementwise"), moved * _PASSES.get(name, 1.0))

    def _convolution(self, name: str, args: Any, out: Any) -> Iterator[Kernel]:
        """The convolution's matmuls, the changes of memory order around each, and the bias.

        Images are in NCHW memory, and the tensor cores read NHWC.
        """
        forward = name == "convolution"
        x, weight, y, sizes = convolution_of(name, args, out)
        if forward:
            matmuls = [sizes.forward]
        elif out[0] is None:  # the first convolution's input is data, which takes no gradient
            matmuls = [sizes.grad_weight]
        else:
            matmuls = [sizes.grad_input, sizes.grad_weight]
        op = "conv" if sizes.taps > 1 else "skip_conv"
        for matmul in matmuls:
            yield Kernel(op, _bytes((x, weight, y)), matmul=matmul)
            # Both images are read in one order and written in the other.
            yield Kernel("elementwise", 2.0 * _bytes((x, y)))
        # The bias is added to the output in place; its gradient is a sum that reads the output's.
        bias_passes = 2.0 if forward else 1.0
        yield Kernel("elementwise", bias_passes * _bytes(y))


def recorded(forward: Callable[[], Any], autocast: bool = True) -> tuple[list[Kernel], float]:
    """Kernels of a forward and a backward pass on the meta device, and bytes saved between them.

    Backward starts from gradients of what `forward` returns, which are not counted.
    """
    recorder, casts, saved = _Recorder(), _Autocast(autocast), {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        # Views of one tensor share its memory, which counts once.
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            saved[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), casts, recorder:
        outputs = tree_leaves(forward())
    recorder.backward = True
    gradients = [
        torch.ones_like(output, memory_format=torch.contiguous_format) for output in outputs
    ]
    with recorder:
        torch.autograd.backward(outputs, gradients)
    # The bfloat16 copies of weights are counted with the weights.
    for weight in casts.weights.values():
        saved.pop(id(weight), None)
    return recorder.kernels, float(_bytes(list(saved.values())))


def plain(config: Config, batch: int, autocast: bool = True) -> tuple[list[Kernel], float]:
    """`recorded` for the whole network and a loss, with `batch` samples."""
    with torch.device("meta"):
        unet = UNet(config.model)
        size, channels = config.data.latent_size, config.model.in_channels
        latents = torch.empty(batch, channels, size, size)
        context = torch.empty(batch, config.data.context_tokens, config.model.context_dim)
        timesteps = torch.zeros(batch, dtype=torch.int64)
    return recorded(lambda: unet(latents, timesteps, context).float().square().mean(), autocast)


def convolution_of(name: str, args: Any, out: Any) -> tuple[Tensor, Tensor, Tensor, Matmuls]:
    """Input, weight, output and matmuls of torch's operator `convolution` or its backward."""
    is_forward = name == "convolution"
    x, weight, y = (args[0], args[1], out) if is_forward else (args[1], args[2], args[0])
    outputs, channels, height, width = weight.shape
    sizes = Matmuls(
        rows=y.numel() // outputs,
        columns=outputs,
        channels=channels,
        taps=height * width,
        stride=args[3 if is_forward else 4][0],
    )
    return x, weight, y, sizes
