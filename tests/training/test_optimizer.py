"""AdamW touches every parameter."""

from __future__ import annotations

import torch

from sd_perf.config import Config
from sd_perf.training.optimizer import build_optimizer, optimizer_tensors, set_step_count


def adamw_by_hand(p, g, m, v, step, lr):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    p = p * (1 - lr * 0.01)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
    return p - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v


def test_every_parameter_is_stepped_and_decayed():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GroupNorm(2, 4))
    optimizer = build_optimizer(network, Config())
    assert len(optimizer.param_groups) == 1
    expected = {
        name: (p.detach().double(), torch.zeros(p.shape), torch.zeros(p.shape))
        for name, p in network.named_parameters()
    }
    optimizer.param_groups[0]["lr"] = 1e-2
    for step in range(1, 4):
        for i, (name, p) in enumerate(network.named_parameters()):
            p.grad = torch.full_like(p, 0.1 * (i + 1) * step)
            value, m, v = expected[name]
            expected[name] = adamw_by_hand(value, p.grad.double(), m, v, step, 1e-2)
        optimizer.step()
    tensors = optimizer_tensors(network, optimizer)
    for name, p in network.named_parameters():
        value, m, v = expected[name]
        torch.testing.assert_close(p.double(), value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(tensors[f"exp_avg.{name}"].double(), m, rtol=1e-6, atol=0)
        torch.testing.assert_close(tensors[f"exp_avg_sq.{name}"].double(), v, rtol=1e-5, atol=0)


def test_step_count_is_what_bias_correction_sees():
    network = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(network, Config())
    set_step_count(optimizer, 41)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(state["step"].item() == 42 for state in optimizer.state.values())
