"""Levels unet and grad: the fast network's prediction and gradients against the plain one's."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn

from sd_perf.runs.parity_record import Level
from sd_perf.tools.parity.comparison import Comparison, Errors, relative_errors
from sd_perf.tools.parity.parameters import indices_by_kind
from sd_perf.tools.parity.parity_case import ParityCase
from sd_perf.tools.parity.yardsticks import plain_torch_networks

PREDICTION = "prediction"


def compare_networks(case: ParityCase, levels: Set[Level]) -> Iterator[Comparison]:
    """Compare the prediction (unet), and gradients by kinds of parameters (grad), as asked for."""
    for dtype in case.dtypes:
        for comparison in _compare_at(dtype, case, with_grads="grad" in levels):
            if comparison.level in levels:
                yield comparison


def _compare_at(dtype: str, case: ParityCase, *, with_grads: bool) -> Iterator[Comparison]:
    # One network exists at a time, and only errors are kept: the benchmark's network takes 7 GB in
    # float64, its gradients as much.
    truth = _results(case, case.plain_network(torch.float64), "float64", with_grads=with_grads)

    def errors_of(unet: nn.Module) -> dict[str, Errors]:
        results = _results(case, unet, dtype, with_grads=with_grads)
        parts = {PREDICTION: [0]}
        if with_grads:
            kinds = indices_by_kind(unet).items()
            parts |= {kind: [1 + index for index in indices] for kind, indices in kinds}
        return {
            name: relative_errors([results[i] for i in part], [truth[i] for i in part])
            for name, part in parts.items()
        }

    by_torch = [errors_of(unet) for unet in plain_torch_networks(case, dtype)]
    for name, fast in errors_of(case.fast_network(dtype)).items():
        comparer = case.comparer("unet" if name == PREDICTION else "grad", dtype)
        yield comparer.errors(name, fast=fast, torch_errors=[errors[name] for errors in by_torch])


def _results(case: ParityCase, unet: nn.Module, dtype: str, *, with_grads: bool) -> list[Tensor]:
    """The prediction (B, C, S, S), then the gradient of every parameter; detached.

    Gradients are of a weighted sum of the prediction.
    """
    latents, timesteps, context = case.inputs()
    if dtype == "float64":
        latents, context = latents.double(), context.double()
    with case.autocast(dtype), torch.set_grad_enabled(with_grads):
        v = unet(latents, timesteps, context)
        # Weights that do not depend on v, rounded so that they are the same in every dtype.
        weights = (latents.roll(1, dims=-1) * 8).round().div(8)[:, : v.shape[1]].to(v.dtype)
        grads = (
            torch.autograd.grad((v * weights).sum(), list(unet.parameters())) if with_grads else ()
        )
    return [v.detach(), *(grad.detach() for grad in grads)]
