"""AdamW in plain torch, and float32 masters kept as bfloat16 weights and 16-bit remainders.

Shape letter: N parameters, all of a model in one flat buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sd_kernels.errors import require

NAN_BITS = 0x7FC00000
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "weights": (),
    "remainders": (torch.int16, torch.uint16),
    "grads": (),
    "exp_avg": (),
    "exp_avg_sq": (),
    "step": (torch.int32, torch.int64, torch.float32, torch.float64),
    "learning_rate": (torch.float32, torch.float64),
}
"""dtypes that each tensor of `adamw` may have; empty: those that the backend takes"""


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 masters into (bfloat16 weights, int16 remainders).

    `join_master` restores every number, infinity and zero exactly. Weights are the upper half of
    bits + 0x8000, which rounds to nearest with ties away from zero; `.to(torch.bfloat16)` differs
    in ties only, which it rounds to even. Remainders are the lower half of the bits. Every NaN
    becomes 0x7FC00000: NVIDIA's 0x7FFFFFFF would carry into the sign and read as -0.
    """
    bits = master.view(torch.int32).where(master == master, NAN_BITS)
    # int32 wraps and int16 keeps the lower half, on every device.
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weights: torch.Tensor, remainders: torch.Tensor) -> torch.Tensor:
    """The float32 masters that `split_master` was given, from bfloat16 weights and remainders.

    Rounding carried into the upper half exactly where the remainder, as a signed number, is
    negative; adding the remainder takes the carry back.
    """
    upper, lower = (
        weights.view(torch.int16).to(torch.int32),
        remainders.view(torch.int16).to(torch.int32),
    )
    return ((upper << 16) + lower).view(torch.float32)


def coefficients(
    step: torch.Tensor, learning_rate: torch.Tensor, beta1: float, beta2: float, weight_decay: float
) -> torch.Tensor:
    """The step's scalars (3,) float64: step size, decay and scale of the root.

    These are learning_rate / (1 - beta1^step), learning_rate * weight_decay and
    1 / sqrt(1 - beta2^step). They are computed on the device, for CUDA graphs, and in float64: in
    float32, 1 - 0.999**step loses half its digits at the first step.
    """
    count, rate = step.reshape(()).double(), learning_rate.reshape(()).double()
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    return torch.stack((rate / correction1, rate * weight_decay, correction2.rsqrt()))


def check(
    *tensors: torch.Tensor | None, floats: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> None:
    """Raise KernelError unless the tensors, in the order of `adamw`, are what it takes.

    `floats` are the dtypes of the floating-point buffers that the backend takes.
    """
    given = {
        name: tensor for name, tensor in zip(DTYPES, tensors, strict=True) if tensor is not None
    }
    weights = given["weights"]
    for name, tensor in given.items():
        dtypes = DTYPES[name] or floats
        takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(tensor.dtype in dtypes, "adamw", f"{name} of {tensor.dtype}", takes)
        require(
            tensor.device == weights.device,
            "adamw",
            f"{weights.device} and {tensor.device}",
            "one device",
        )
        got = f"{name} of shape {tuple(tensor.shape)} beside weights of {tuple(weights.shape)}"
        if name in ("step", "learning_rate"):
            require(tensor.numel() == 1, "adamw", got, "one number")
            continue
        is_flat = tensor.dim() == 1 and tensor.numel() > 0 and tensor.shape == weights.shape
        require(is_flat, "adamw", got, "flat buffers of one length, not empty")
        got = f"{name} of stride {tensor.stride(0)}"
        require(name == "grads" or tensor.is_contiguous(), "adamw", got, "adjacent elements")
    got = f"{weights.dtype} weights with{'' if 'remainders' in given else 'out'} remainders"
    is_pair = ("remainders" in given) == (weights.dtype == torch.bfloat16)
    require(is_pair, "adamw", got, "bfloat16 weights with remainders, or float32 weights without")


@torch.no_grad()
def adamw(
    weights: torch.Tensor,
    remainders: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[torch.Tensor, ...]:
    """One step of AdamW in place on flat buffers (N,).

    Returns (weights, exp_avg, exp_avg_sq) and the remainders, if there are any. Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, for every parameter
    including biases and norms:

        m += (1 - beta1) (g - m)
        v += (1 - beta2) (g^2 - v)
        w -= rate weight_decay w
             + rate / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    Weights are float32, or bfloat16 with 16-bit remainders (see `split_master`). Gradients and each
    moment are float32 or bfloat16. float64 throughout serves as truth. `step` (1 at the first call;
    integer or floating) and `learning_rate` (floating) are one-element tensors on the same device,
    so that a CUDA graph can capture the call. The weights are updated with the exact moments;
    moments in bfloat16 are rounded to nearest even afterwards. Beware of exp_avg_sq in bfloat16
    with beta2 = 0.999: its decay of a tenth of a percent is less than half an ulp (0.2 to 0.4 %),
    so that it grows but never decays. Raises KernelError for other inputs.
    """
    floats = torch.float32, torch.bfloat16, torch.float64
    check(weights, remainders, grads, exp_avg, exp_avg_sq, step, learning_rate, floats=floats)
    master = weights if remainders is None else join_master(weights, remainders)
    # One rounding for each operation, in this order: addcmul, lerp and alpha would fuse two.
    scalars = coefficients(step, learning_rate, beta1, beta2, weight_decay).to(master.dtype)
    step_size, decay, root_scale = scalars.unbind()
    g, m, v = (tensor.to(master.dtype) for tensor in (grads, exp_avg, exp_avg_sq))
    m = m + (g - m) * (1 - beta1)
    v = v + (g * g - v) * (1 - beta2)
    # On a CPU torch's float32 root may be an ulp off. The float64 root, rounded to float32, is the
    # correctly rounded one.
    root = v.double().sqrt().to(v.dtype)
    update = m / (root * root_scale + eps)
    master = master - (master * decay + update * step_size)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if remainders is None:
        return weights.copy_(master), exp_avg, exp_avg_sq
    upper, lower = split_master(master)
    remainders.view(torch.int16).copy_(lower)
    return weights.copy_(upper), exp_avg, exp_avg_sq, remainders
