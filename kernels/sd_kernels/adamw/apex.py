"""AdamW by the kernel of `apex.optimizers.FusedAdam(capturable=True)`, on one flat buffer.

Apex takes the dtype and order of the first list for those of all lists, without comparing, and
keeps no float32 masters of bfloat16 weights; this adapter refuses both. Apex also writes the
gradients back as it read them: 4 bytes a parameter more than the other backends move.
"""

from __future__ import annotations

import amp_C
import torch
from apex.multi_tensor_apply import multi_tensor_applier

from sd_kernels.adamw.reference import check
from sd_kernels.errors import require

DECOUPLED, CORRECT_BIAS = 1, 1


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
    """See `reference.adamw`; float32 only, without remainders, fewer than 2^31 parameters."""
    tensors = weights, remainders, grads, exp_avg, exp_avg_sq, step, learning_rate
    check(*tensors, floats=(torch.float32,))
    require(
        weights.numel() < 2**31, "adamw (apex)", f"{weights.numel()} parameters", "fewer than 2^31"
    )
    multi_tensor_applier(
        amp_C.multi_tensor_adam_capturable,
        torch.zeros(1, dtype=torch.int32, device=weights.device),
        [[grads.contiguous()], [weights], [exp_avg], [exp_avg_sq]],
        learning_rate.reshape(1).float(),
        beta1,
        beta2,
        eps,
        step.reshape(1).int(),
        DECOUPLED,
        CORRECT_BIAS,
        weight_decay,
        torch.ones(1, device=weights.device),
    )
    return weights, exp_avg, exp_avg_sq
