"""AdamW over every parameter, the learning-rate schedule, and their state by parameter name."""

from __future__ import annotations

import torch

from sd_perf.config import Config, OptimizerConfig


def build_optimizer(unet: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW in one group: the benchmark decays norms and biases like everything else. State is made
    at once."""
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


def learning_rate(config: OptimizerConfig, full_rate: float, step: int) -> float:
    """Rate of optimizer step `step` (0 is the first): linear from warmup_start x full_rate, then
    constant."""
    if step >= config.warmup_steps:
        return full_rate
    return full_rate * (
        config.warmup_start + (1.0 - config.warmup_start) * step / config.warmup_steps
    )


def optimizer_tensors(
    unet: torch.nn.Module, optimizer: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """Both moments of every parameter as `exp_avg.<name>` and `exp_avg_sq.<name>`; the tensors
    themselves."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for moment in ("exp_avg", "exp_avg_sq")
        for name, parameter in unet.named_parameters()
    }


def set_step_count(optimizer: torch.optim.AdamW, step: int) -> None:
    """Set the number of steps taken, which the bias correction counts."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
