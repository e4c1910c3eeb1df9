"""What the fast UNet keeps for its backward pass, counted on the meta device, is what the estimate
says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sd_kernels.attention.packing import separate
from sd_kernels.registry import all_ops
from sd_perf.config import Config, UNetConfig
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.tools.estimate.predict import predict


def attention(qkv: torch.Tensor, kv: torch.Tensor | None = None, *, num_heads: int) -> torch.Tensor:
    """By a fused kernel, which keeps no scores; meta tensors have no other."""
    q, k, v = (x.transpose(1, 2) for x in separate("attention", qkv, kv, num_heads))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).flatten(2)


def conv(*args: Any, **options: Any) -> torch.Tensor:
    """In the memory order that cuDNN gives."""
    y = all_ops()["conv"].reference()(*args, **options)
    return y.contiguous(memory_format=torch.channels_last)


def kept_bytes(batch: int) -> int:
    """Of all tensors that forward keeps in bfloat16, parameters aside; packed weights are among
    them."""
    named = {"linear": "torch", "skip_conv": "cublas"}
    ops: dict[str, Any] = {"attention": attention, "conv": conv}
    for name in all_ops().keys() - ops.keys():
        ops[name] = all_ops()[name].backend(named.get(name, "triton")).function(name)
    kept: dict[int, torch.Tensor] = {}
    with torch.device("meta"):
        unet = FastUNet(UNetConfig(), Ops(ops)).bfloat16()
        own = {id(parameter) for parameter in unet.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            base = tensor if tensor._base is None else tensor._base
            if id(base) not in own:
                kept[id(base)] = base
            return tensor

        latents = torch.empty(batch, 4, 64, 64, dtype=torch.bfloat16)
        texts = unet.project_text(torch.empty(batch, 77, 1024, dtype=torch.bfloat16))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet._predict(latents, torch.zeros(batch, dtype=torch.int64), texts)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def test_activations_of_the_benchmark() -> None:
    two, four = kept_bytes(2), kept_bytes(4)
    a_sample = (four - two) / 2
    memory = predict(Config(), "h100", 64)["memory_bytes"]
    assert a_sample == pytest.approx(memory["activations"] / 64, rel=0.01)
    packed = two - 2 * a_sample
    assert 0 < packed < 0.5e9
    assert memory["total"] + packed < 80e9
