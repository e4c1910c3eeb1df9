"""How many instructions a thread executes for a tile, read from disassembled machine code."""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@\S+ )?\s*([A-Z][\w.]*)(.*);")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")

TILES = {
    "diffusion_inputs_kernel": ("C", "PIXELS"),
    "geglu_backward_kernel": ("ROWS", "COLUMNS"),
    "geglu_forward_kernel": ("ROWS", "COLUMNS"),
    "group_norm_backward_kernel": ("ROWS", "BLOCK"),
    "group_norm_forward_kernel": ("ROWS", "BLOCK"),
    "interleave_backward_kernel": ("ROWS", "COLUMNS"),
    "interleave_forward_kernel": ("ROWS", "COLUMNS"),
    "layer_norm_backward_kernel": ("ROWS", "C"),
    "layer_norm_forward_kernel": ("ROWS", "C"),
    "adamw_kernel": ("BLOCK",),
    "average_kernel": ("BLOCK",),
    "residual_add_kernel": ("ROWS", "COLUMNS"),
    "v_mse_loss_backward_kernel": ("BLOCK",),
    "v_mse_loss_forward_kernel": ("BLOCK",),
}
"""the constants whose product is the elements of a tile, of each kernel that memory should bound"""


@dataclass(frozen=True)
class Step:
    """One instruction, and where it may go on."""

    name: str
    conditional: bool
    label: str
    """that a branch names; empty for any other instruction"""


def parse(sass: str) -> tuple[list[Step], dict[str, int]]:
    """Instructions in their order, and the place of each label; `sass` is what nvdisasm prints."""
    steps: list[Step] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(steps)
        elif found := INSTRUCTION.match(line):
            condition, name, rest = found.groups()
            target = TARGET.search(rest) if name.startswith("BRA") else None
            steps.append(Step(name, condition is not None, target.group(1) if target else ""))
    return steps, labels


def instructions(sass: str, whole: bool = False) -> int:
    """Instructions of the path on which a program spends its time.

    That is one turn of the longest loop that reads global memory, where there is one; otherwise the
    longest way to the end, which takes no branch backwards. With `whole` it is every instruction,
    for kernels whose programs take one of two paths and of which each tile needs both.
    """
    steps, labels = parse(sass)
    if whole:
        return sum(step.name != "NOP" for step in steps)
    loops = [
        number - labels[step.label] + 1
        for number, step in enumerate(steps)
        if step.label
        and labels[step.label] <= number
        and any(each.name.startswith("LDG") for each in steps[labels[step.label] : number])
    ]
    return max(loops) if loops else _longest(steps, labels)


def _longest(steps: list[Step], labels: dict[str, int]) -> int:
    lengths = [0] * (len(steps) + 1)
    for number in reversed(range(len(steps))):
        step = steps[number]
        goes_on = step.conditional or not step.name.startswith(("BRA", "EXIT"))
        ways = [lengths[number + 1]] if goes_on else [0]
        if step.label and labels[step.label] > number:
            ways.append(lengths[labels[step.label]])
        lengths[number] = max(ways) + (step.name != "NOP")
    return lengths[0]
