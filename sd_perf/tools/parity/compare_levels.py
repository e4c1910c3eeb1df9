"""One process's part of a parity run: all levels asked for, in the place where it runs kernels."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from sd_kernels import launch
from sd_perf.config import Config
from sd_perf.runs.parity_record import Level, Where
from sd_perf.tools.parity.blocks import compare_blocks
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.loss_curves import compare_loss_curves
from sd_perf.tools.parity.operators import compare_operators
from sd_perf.tools.parity.parity_case import ParityCase
from sd_perf.tools.parity.training_step import compare_steps
from sd_perf.tools.parity.whole_network import compare_networks
from sd_perf.tools.parity.whole_runs import compare_scores


def compare_levels(
    config: Config, where: Where, levels: Set[Level], folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The comparisons and what ran for them, as JSON takes it.

    `folder` is that of the record; whole runs are kept in it. `tell` is given lines of progress.
    Raises UserError or KernelError where the config cannot be compared here.
    """
    case, comparisons = ParityCase.of(config, where), list[Comparison]()
    curves: dict[str, list[float]] = {}
    if "op" in levels:
        comparisons += compare_operators(case)
    if "block" in levels:
        comparisons += compare_blocks(case)
    if levels & {"unet", "grad"}:
        comparisons += compare_networks(case, levels)
    if "step" in levels:
        comparisons += compare_steps(case)
    if "trajectory" in levels:
        comparisons += compare_loss_curves(case, curves)
    if "world" in levels:
        comparisons += compare_scores(config, where=where, folder=folder / "world", tell=tell)
    executed: dict[str, dict[str, int]] = {}
    for (op, backend), calls in sorted(case.executed.items()):
        executed.setdefault(op, {})[backend] = calls
    return {
        "where": where,
        "rows": [comparison.as_dict() for comparison in comparisons],
        "executed": executed,
        "triton_launches": dict(launch.executed),
        "notes": case.notes,
        "curves": curves,
    }
