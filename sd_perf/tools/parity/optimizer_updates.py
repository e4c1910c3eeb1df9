"""Level step, its optimizer: changes of the weights by AdamW, and bfloat16 weights with remainders.

Shape letters: N parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sd_kernels.adamw.reference import adamw as textbook_adamw
from sd_kernels.adamw.reference import join_master, split_master
from sd_kernels.registry import all_ops
from sd_perf.config import Config
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.parameters import indices_by_kind
from sd_perf.tools.parity.parity_case import SEED, ParityCase
from sd_perf.training.optimizer import build_optimizer

STEPS = 3
RATE = 1e-3
"""learning rate: large enough that float32 weights show the changes"""
MASTER_STEPS = 40
MASTER_RATE = 1e-6
"""learning rate: so small that bfloat16 weights without remainders lose the changes"""


def compare_optimizer(case: ParityCase) -> Iterator[Comparison]:
    """Compare the change of the weights by the trainer's optimizer, by kinds of parameters.

    Torch's AdamW, unfused, is given the same gradients; the truth is the formula in float64.
    """
    unet = case.plain_network()
    start = [parameter.detach().clone() for parameter in unet.parameters()]
    generator = torch.Generator().manual_seed(SEED)
    grads = [
        [torch.randn(p.shape, generator=generator).to(p.device) for p in start]
        for _ in range(STEPS)
    ]
    unfused_weights = [weights.clone() for weights in start]
    options = case.config.optimizer
    unfused = torch.optim.AdamW(
        unfused_weights,
        betas=(options.beta_1, options.beta_2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        foreach=False,
    )
    trained = build_optimizer(unet, case.config)
    by_trainer = _changes(trained, list(unet.parameters()), start, grads)
    by_torch = _changes(unfused, unfused_weights, start, grads)
    truth = textbook_changes(case.config, start, grads, RATE)
    for kind, indices in indices_by_kind(unet).items():
        yield case.comparer("step", "float32").tensors(
            f"AdamW's change of {kind}",
            fast=[by_trainer[i] for i in indices],
            torch_results=[[by_torch[i] for i in indices]],
            truth=[truth[i] for i in indices],
        )


def _changes(
    optimizer: torch.optim.Optimizer,
    weights: list[Tensor],
    start: list[Tensor],
    grads: list[list[Tensor]],
) -> list[Tensor]:
    """Changes of the weights (float64) by the optimizer's steps, one for each list of gradients."""
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for grads_of_step in grads:
        for parameter, grad in zip(weights, grads_of_step, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return [w.detach().double() - first.double() for w, first in zip(weights, start, strict=True)]


def textbook_changes(
    config: Config, start: list[Tensor], grads: list[list[Tensor]], rate: float
) -> list[Tensor]:
    """Changes of the weights by AdamW as its authors wrote it (Loshchilov & Hutter 2019), float64.

    `start` are the weights, `grads` a list of their gradients for each step, `rate` the learning
    rate of all steps.
    """
    constants, changes = _constants(config), []
    for index, first in enumerate(start):
        weights = first.double().flatten().clone()
        moments = torch.zeros_like(weights), torch.zeros_like(weights)
        for step, grads_of_step in enumerate(grads, start=1):
            scalars = (weights.new_tensor(value) for value in (step, rate))
            grad = grads_of_step[index].double().flatten()
            textbook_adamw(weights, None, grad, *moments, *scalars, **constants)
        changes.append(weights.view(first.shape) - first.double())
    return changes


def _constants(config: Config) -> dict[str, Any]:
    options = config.optimizer
    betas = {"beta1": options.beta_1, "beta2": options.beta_2}
    return {**betas, "eps": options.epsilon, "weight_decay": options.weight_decay}


def keeps_remainders(case: ParityCase) -> bool:
    """Whether the chosen AdamW takes bfloat16 weights with remainders, not float32 alone."""
    spec = all_ops()["adamw"]
    # The first small case has weights of the model's dtype.
    return not spec.backend(case.choices["adamw"].backend).refuses(
        spec.small_cases[0], torch.bfloat16
    )


def compare_masters(case: ParityCase) -> Comparison:
    """Compare float32 masters, kept as bfloat16 weights (N,) and 16-bit remainders (N,).

    The steps are too small for bfloat16 weights alone. Plain torch has float32 masters.
    """
    N, device, constants = 4099, case.device, _constants(case.config)
    generator = torch.Generator(device).manual_seed(SEED)
    start = torch.randn(N, generator=generator, device=device) * 0.05
    grads = [
        torch.randn(N, generator=generator, device=device).bfloat16() for _ in range(MASTER_STEPS)
    ]
    rate = torch.tensor(MASTER_RATE, dtype=torch.float64, device=device)

    def change(
        function: Callable[..., Any],
        weights: Tensor,
        remainders: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        moments = [torch.zeros(N, dtype=dtype, device=device) for _ in range(2)]
        for step, grad in enumerate(grads, start=1):
            count = torch.tensor(step, device=device)
            given = grad if remainders is not None else grad.to(dtype)
            function(weights, remainders, given, *moments, count, rate, **constants)
        master = weights if remainders is None else join_master(weights, remainders)
        return master.double() - start.double()

    with_remainders = change(case.ops.adamw, *split_master(start), torch.float32)
    in_float32, in_float64 = (
        change(textbook_adamw, start.to(dtype).clone(), None, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    return case.comparer("step", "bfloat16 + remainders").tensors(
        f"masters of bfloat16 weights, {MASTER_STEPS} small steps",
        fast=[with_remainders],
        torch_results=[[in_float32]],
        truth=[in_float64],
    )
