"""AdamW over every parameter.

Two implementations of the same update (Loshchilov and Hutter, arXiv 1711.05101): torch's fused
AdamW, which the trainer runs, and `FlatAdamW`, one kernel over the buffers of `training.flat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sd_perf.config import Config, OptimizerConfig
from sd_perf.training.flat import FlatParameters
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

    Step count and learning rate are tensors, so that a CUDA graph reads them at every replay.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        config: OptimizerConfig,
        learning_rate: float,
        adamw: Callable[..., Any],
    ) -> None:
        weights = parameters.weights
        self.parameters = parameters
        self.exp_avg = torch.zeros_like(weights, dtype=torch.float32)
        self.exp_avg_sq = torch.zeros_like(weights, dtype=torch.float32)
        self.step_count = torch.zeros((), dtype=torch.int64, device=weights.device)
        """steps taken"""
        self.learning_rate = torch.tensor(learning_rate, device=weights.device)
        self._adamw = adamw
        self._options = {
            "beta1": config.beta_1,
            "beta2": config.beta_2,
            "eps": config.epsilon,
            "weight_decay": config.weight_decay,
        }

    def step(self, grads: Tensor) -> None:
        """Update weights, remainders and moments from the gradients (N,) of the flat buffer."""
        flat = self.parameters
        self.step_count += 1
        buffers = (flat.weights, flat.remainders, grads, self.exp_avg, self.exp_avg_sq)
        self._adamw(*buffers, self.step_count, self.learning_rate, **self._options)

    def reset(self) -> None:
        """Set moments and step count to 0; weights and learning rate stay."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.step_count):
            tensor.zero_()
