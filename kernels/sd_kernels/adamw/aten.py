"""AdamW by the fused kernel of `torch.optim.AdamW(fused=True)`, on one flat buffer."""

from __future__ import annotations

import torch

from sd_kernels.adamw.reference import check


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
    """See `reference.adamw`; float32 only, without remainders."""
    tensors = weights, remainders, grads, exp_avg, exp_avg_sq, step, learning_rate
    check(*tensors, floats=(torch.float32,))
    torch._fused_adamw_(
        [weights],
        [grads.contiguous()],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.reshape(()).float()],
        lr=learning_rate.reshape(()).float(),
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return weights, exp_avg, exp_avg_sq
