"""AdamW over every parameter.

Two implementations of the same update (Loshchilov and Hutter, arXiv 1711.05101): torch's fused
AdamW for the plain network, and for the fast one `FlatAdamW`, one kernel over the buffers of
`training.flat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sd_perf.config import Config, OptimizerConfig
from sd_perf.training.flat import ALIGNMENT, Bucket, FlatParameters
from sd_perf.training.learning_rate import learning_rate


def build_optimizer(unet: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """torch's fused AdamW in one group: the benchmark decays norms and biases like all else.

    The state is allocated here and not by the first step, so that a checkpoint can be loaded.
    """
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=learning_rate(options, config.learning_rate, 0),
        betas=(options.beta_1, options.beta_2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        fused=True,
    )
    for parameter in unet.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def optimizer_tensors(unet: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Both moments of every parameter as `exp_avg.<name>` and `exp_avg_sq.<name>`, not copied."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for moment in ("exp_avg", "exp_avg_sq")
        for name, parameter in unet.named_parameters()
    }


def set_step_count(optimizer: torch.optim.AdamW, step: int) -> None:
    """Set the number of steps taken, which the bias correction counts."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


class FlatAdamW:
    """AdamW on the buffers of `FlatParameters`, moments in float32, by a backend of op `adamw`.

    It updates this rank's shares of the weights. Step and learning rate are tensors, so that a CUDA
    graph reads them at every replay.
    """

    def __init__(
        self, parameters: FlatParameters, config: OptimizerConfig, adamw: Callable[..., Any]
    ) -> None:
        device = parameters.weights.device
        self.parameters = parameters
        self.exp_avg = parameters.local_buffer(torch.float32)
        self.exp_avg_sq = parameters.local_buffer(torch.float32)
        self.step_number = torch.ones((), dtype=torch.int64, device=device)
        """number of the step that comes next, from 1"""
        self.learning_rate = torch.zeros((), dtype=torch.float64, device=device)
        self._adamw = adamw
        self._options = {
            "beta1": config.beta_1,
            "beta2": config.beta_2,
            "eps": config.epsilon,
            "weight_decay": config.weight_decay,
        }

    def step(self, bucket: Bucket) -> None:
        """Update this rank's share of a bucket: weights, remainders and moments."""
        flat, local = self.parameters, bucket.local
        self._adamw(
            flat.weights[bucket.share],
            None if flat.remainders is None else flat.remainders[local],
            flat.grads[bucket.share],
            self.exp_avg[local],
            self.exp_avg_sq[local],
            self.step_number,
            self.learning_rate,
            **self._options,
        )

    def try_on_scratch(self) -> None:
        """One step on small copies: what it compiles is there afterwards, no state has changed.

        Their lengths and addresses are multiples of the same powers of two as those of the shares,
        which is what Triton compiles for.
        """
        flat, part = self.parameters, slice(0, 16 * ALIGNMENT)
        weights, grads = flat.weights[part].clone(), flat.grads[part].clone()
        locals_ = (flat.remainders, self.exp_avg, self.exp_avg_sq)
        remainders, *moments = (None if own is None else own[part].clone() for own in locals_)
        state = (weights, remainders, grads, *moments)
        self._adamw(*state, self.step_number, self.learning_rate, **self._options)
