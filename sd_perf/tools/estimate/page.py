"""The figures of `predict` for people: tables for the terminal, and a chart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_kernels.targets import GPUS
from sd_perf.files import disk_errors, written_aside
from sd_perf.optional import optional
from sd_perf.tools.estimate.predict import RECIPES, operators

_COLOURS = (
    *("#0b5a94", "#5b9bc8", "#9cc3e0", "#b5651d", "#d99a5b", "#7a7a7a", "#b5b5b5", "#e3e3e3"),
    "#8c4a9e",
)
"""of the families: blues multiply matrices, browns and greys move memory, violet waits for GPUs"""


def tables(facts: dict[str, Any]) -> Iterable[Any]:
    """Times, memory and notes for the terminal."""
    yield _times(facts)
    yield _memory(facts)
    yield _expected(facts["installed"])
    yield _communication(facts)
    yield "fused is the fast network's step in one CUDA graph."
    yield from facts["notes"]


def _communication(facts: dict[str, Any]) -> str:
    """Over how many GPUs, and how much of their communication is waited for."""
    ranks, nodes = facts["ranks"], facts["nodes"]
    if ranks == 1:
        return "One GPU: no communication."
    waited = ", ".join(
        f"{name} {recipe['communication_ms']:.1f} ms, of which "
        f"{recipe['communication_exposed_ms']:.1f} are waited for"
        for name, recipe in facts["recipes"].items()
    )
    return (
        f"{ranks} GPUs on {nodes} nodes of {ranks // nodes}; times and rates are of each GPU. "
        f"Communication of a step, by NCCL's model: {waited}."
    )


def _expected(installed: dict[str, Any]) -> str:
    """What fused amounts to with the attention that is installed, and what may be reached."""
    rate, library = installed["samples_per_second"], installed["attention_rates"]
    chosen = f"{installed['attention']} ({library})"
    text = f"fused with attention by {chosen}: at most {rate:.1f} samples/s"
    if installed["expected"] is None:
        return f"{text}; no published run says how much of it is reached on this GPU."
    (low, high), shares = installed["expected"], installed["shares_reached"]
    return (
        f"{text}; expected {low:.0f} to {high:.0f}, the {shares[0]:.2f} to {shares[1]:.2f} of the "
        "estimate that the best MLPerf entries reached on this kind of GPU."
    )


def _times(facts: dict[str, Any]) -> Any:
    from rich.table import Table  # the figures themselves need no terminal

    from sd_perf.console import styled

    recipes = facts["recipes"]
    title = f"{GPUS[facts['gpu']].title}, batch {facts['batch']}: ms and GB per sample, at least"
    # All ms first, then all GB, so that one kind of number can be compared along the row.
    headers = [f"{recipe}\n{unit}" for unit in ("ms", "GB") for recipe in recipes]
    table = Table("", *headers, title=title, title_justify="left")
    for op in (op for ops in operators().values() for op in ops):
        rows = [recipe["by_op"].get(op) for recipe in recipes.values()]
        if any(rows):  # an op that no recipe has gets no row
            cells = [row and row[key] for key in ("ms_per_sample", "gigabytes") for row in rows]
            table.add_row(op, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    table.add_section()
    times = [recipe["ms_per_sample"] for recipe in recipes.values()]
    moved = [
        sum(row["gigabytes"] for row in recipe["by_op"].values()) for recipe in recipes.values()
    ]
    table.add_row("sum", *(f"{value:.3f}" for value in [*times, *moved]))
    rates = (styled("bold", f"{recipe['samples_per_second']:.1f}") for recipe in recipes.values())
    table.add_row("samples/s at most", *rates)
    return table


def _memory(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    recipes = facts["recipes"]
    table = Table("", *recipes, title="memory, GB", title_justify="left")
    for name in facts["memory_bytes"]:
        sizes = (recipe["memory_bytes"][name] for recipe in recipes.values())
        table.add_row(name, *(f"{size / 1e9:.1f}" for size in sizes))
    largest = (f"{recipe['largest_batch']:,}" for recipe in recipes.values())
    table.add_row("largest batch", *largest)
    return table


def draw(facts: dict[str, Any], path: Path) -> None:
    """A PNG of stacked bars, ms per sample by family of ops.

    Raises ConfigError where matplotlib is missing, UserError where the file cannot be written.
    """
    figures = optional("matplotlib.figure", "a chart needs matplotlib", "report")
    figure = figures.Figure(figsize=(10.4, 3.4), layout="constrained")
    axes = figure.subplots()
    recipes = facts["recipes"]
    # A bar is a recipe; each family is stacked on the ends of those before it.
    labels, ends = [RECIPES[name].description for name in recipes], [0.0] * len(recipes)
    for (family, ops), colour in zip(operators().items(), _COLOURS, strict=True):
        spent = [
            sum(recipe["by_op"][op]["ms_per_sample"] for op in ops if op in recipe["by_op"])
            for recipe in recipes.values()
        ]
        if any(spent):
            axes.barh(labels, spent, left=ends, color=colour, label=family, height=0.62)
            ends = [end + width for end, width in zip(ends, spent, strict=True)]
    for place, (end, recipe) in enumerate(zip(ends, recipes.values(), strict=True)):
        rate = f"  at most {recipe['samples_per_second']:,.0f} samples/s"
        axes.text(end, place, rate, va="center")
    axes.invert_yaxis()  # the first recipe at the top
    # The rates stand to the right of the bars and need room.
    axes.set_xlim(0, 1.3 * max(ends))
    axes.spines[["top", "right"]].set_visible(False)
    title = GPUS[facts["gpu"]].title
    axes.set_xlabel(f"ms per sample, at least: {title}, batch {facts['batch']}")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    # Written beside it and moved: a full disk leaves no half picture.
    with disk_errors(path, "choose another --png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as draft:
            figure.savefig(draft, dpi=150, format="png")
