"""Compile every Triton kernel for GPUs that are not here, and read what the compiler made of it.

    python -m benchmarks.ahead_of_time [--ops geglu ...] [--targets 80 90 100] [--markdown FILE]

Each op's real calls (full size, bfloat16) are recorded where they would launch; Triton's own binder
gives signature and hints from those arguments, so that what is compiled is what would run. A kernel
is red where it

- has a stack frame, or spills (STL, LDL),
- reads or writes global memory by less than 16 bytes a thread at a source line not marked `#
  narrow: <why>`,
- multiplies matrices without the target's matrix instructions (HMMA on 8.0, HGMMA on 9.0, UTC*MMA
  on 10.0).

Must run without TRITON_INTERPRET. Exit code 1 where something is red.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sd_kernels.launch import Launch, interpreted, recording
from sd_kernels.registry import all_ops
from sd_kernels.spec import Inputs, OpSpec

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
INLINE_ASSEMBLY = re.compile(r"// begin inline asm\n.*?// end inline asm", re.DOTALL)
GLOBAL_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.(\S+)")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one specialisation of one kernel."""

    op: str
    kernel: str
    case: str
    target: int
    registers: int
    shared_bytes: int
    warps: int
    stack_bytes: int
    spills: int
    wide_accesses: int
    narrow_lines: tuple[str, ...]
    """source lines with narrow accesses that do not say why"""
    matrix: str
    """instructions found, `missing`, or an empty string where the kernel multiplies no matrices"""

    @property
    def ok(self) -> bool:
        """Nothing is red."""
        return not (
            self.stack_bytes or self.spills or self.narrow_lines or self.matrix == "missing"
        )


class Untouched(TorchDispatchMode):
    """Gives empty tensors in place of what torch's convolutions would compute, which at full size
    takes hours here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        results = func(
            *pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args),
            **(kwargs or {}),
        )
        return pytree.tree_map_only(
            torch.Tensor, lambda result: torch.empty_like(result, device="cpu"), results
        )


def launches_of(spec: OpSpec, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The launches of every full-size case, forward and backward; tensors are allocated but never
    touched."""
    function = spec.backend("triton").function(spec.name)
    for case in spec.cases:
        inputs = spec.inputs(case, Inputs(case, dtype, empty=True))
        with recording() as launches, Untouched():
            results = function(**inputs)
            outputs = [
                out
                for out in (results if isinstance(results, tuple) else (results,))
                if out.requires_grad
            ]
            leaves = [
                value
                for value in inputs.values()
                if isinstance(value, torch.Tensor) and value.requires_grad
            ]
            if outputs:
                torch.autograd.grad(
                    outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True
                )
        yield from ((case.name, launch) for launch in launches)


def accesses_at_their_lines(*stage: Any) -> Any:
    """A hook of Triton's compiler. Loads are inline assembly of several lines, which LLVM counts on
    from the source line, so that a load would be found a few lines below itself; the lines within
    are dropped."""
    if not stage:
        return "accesses at their lines", "1"  # part of the key of Triton's cache
    stages = stage[1]
    make_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: INLINE_ASSEMBLY.sub(
        lambda block: re.sub(r"\t\.loc\t.*\n", "", block.group()), make_ptx(source, metadata)
    )
    return None


def compile_for(launch: Launch, capability: int) -> tuple[str, Any, dict[str, Any]]:
    """Key of the specialisation, its source for the compiler, and the options, as the launcher
    would make them."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, kwargs = binder(*launch.arguments, **launch.options)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, None
    )
    key = f"{kernel.fn.__module__}.{kernel.fn.__name__}{specialization}{sorted(kwargs.items())}"
    return key, ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def inspect(
    op: str, case: str, launch: Launch, source: Any, options: dict[str, Any], capability: int
) -> Compiled:
    """Compile one specialisation and read registers, stack, spills, access widths and matrix
    instructions."""
    triton.knobs.runtime.add_stages_inspection_hook = accesses_at_their_lines
    triton.knobs.compilation.always_compile = (
        True  # a cached result may name the files of another checkout
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-g", "-c", file.name)
    narrow, wide = _accesses(sass)
    has_dot = "tt.dot" in compiled.asm["ttir"]
    found = re.search(rf"\b{MATRIX_INSTRUCTIONS[capability]}\b", sass)
    return Compiled(
        op=op,
        kernel=launch.kernel.fn.__name__,
        case=case,
        target=capability,
        registers=int(_number(r"REG:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        stack_bytes=int(_number(r"STACK:(\d+)", usage)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        wide_accesses=wide,
        narrow_lines=tuple(sorted(narrow)),
        matrix=(found.group() if found else "missing") if has_dot else "",
    )


def _accesses(sass: str) -> tuple[set[str], int]:
    """Source lines with unexplained narrow accesses to global memory, and the number of wide
    accesses.

    The line of an inlined function's access is the one in that function, not its caller's.
    """
    place, narrow, wide = ("", 0), set(), 0
    for line in sass.splitlines():
        if mark := re.search(r'//## File "([^"]*)", line (\d+)', line):
            place = (mark.group(1), int(mark.group(2)))
        elif access := GLOBAL_ACCESS.search(line):
            if re.search("128|256", access.group(2)):
                wide += 1
            elif not _explained(*place):
                narrow.add(
                    f"{Path(place[0]).parent.name}/{Path(place[0]).name}:{place[1]} "
                    f"{access.group()}"
                )
    return narrow, wide


def _explained(path: str, number: int) -> bool:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return 0 < number <= len(lines) and "# narrow: " in lines[number - 1]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"{pattern} not in what the tool printed: {text[:200]}")
    return found.group(1)


def compile_all(
    ops: list[str], targets: list[int], dtype: torch.dtype = torch.bfloat16
) -> list[Compiled]:
    """One row per distinct specialisation and target, of those that the op's kernels are for."""
    rows: dict[tuple[str, int], Compiled] = {}
    launches = [(op, *recorded) for op in ops for recorded in launches_of(all_ops()[op], dtype)]
    for (op, case, launch), capability in product(launches, targets):
        if divmod(capability, 10) < all_ops()[op].backend("triton").capability:
            continue
        key, source, options = compile_for(launch, capability)
        if (key, capability) not in rows:
            rows[key, capability] = inspect(op, case, launch, source, options, capability)
    return list(rows.values())


def markdown(rows: list[Compiled]) -> str:
    """A table for the documentation: a line per kernel, with what its specialisations need on each
    target."""
    targets = sorted({row.target for row in rows})
    head = [
        "kernel",
        *(f"registers sm_{target}" for target in targets),
        "shared",
        "stack",
        "spills",
        "verdict",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    kernels: dict[str, list[Compiled]] = {}
    for row in rows:
        kernels.setdefault(row.kernel, []).append(row)
    for kernel, alike in kernels.items():
        registers = [
            _span([row.registers for row in alike if row.target == target]) for target in targets
        ]
        memory = (
            _span([getattr(row, key) for row in alike])
            for key in ("shared_bytes", "stack_bytes", "spills")
        )
        red = sorted(
            {
                reason
                for row in alike
                if not row.ok
                for reason in (*row.narrow_lines, row.matrix, row.case)
            }
        )
        verdict = f"{len(alike)} green" if not red else f"red: {'; '.join(filter(None, red))}"
        lines.append(f"| {' | '.join((f'`{kernel}`', *registers, *memory, verdict))} |")
    return "\n".join(lines) + "\n"


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "-"
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def main() -> int:
    """Compile, print a line per kernel, write what was asked for."""
    with_triton = [
        name for name, spec in all_ops().items() if any(b.name == "triton" for b in spec.backends)
    ]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ops", nargs="+", choices=with_triton, default=with_triton)
    parser.add_argument(
        "--targets", nargs="+", type=int, choices=list(MATRIX_INSTRUCTIONS), default=[80, 90, 100]
    )
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    if interpreted():
        parser.error(
            "TRITON_INTERPRET is set; unset it, since only the compiler's path can be compiled"
        )
    rows = compile_all(options.ops, options.targets)
    for row in rows:
        what = f"sm_{row.target} {row.op} {row.kernel} ({row.case})"
        print(
            f"ok  {what}: {row.registers} registers, {row.wide_accesses} wide"
            if row.ok
            else f"RED {what}: {row}"
        )
    print(
        f"triton {triton.__version__}: {sum(row.ok for row in rows)} of {len(rows)} "
        "specialisations green"
    )
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    if options.json:
        options.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
