"""Every Triton kernel, compiled for GPUs that are not here, and what the compiler made of it.

    python -m benchmarks.ahead_of_time [--ops geglu ...] [--targets 80 90 100] [--markdown FILE]

The launches of each op's real calls (full size, bfloat16) are recorded instead of run. Triton's own
binder derives signature and hints from their arguments, so that what is compiled is what would run.
A kernel is red where it

- has a stack frame, or spills registers (STL, LDL),
- reads or writes global memory by less than 16 bytes a thread, at a source line without a comment
  `# narrow: <why>`,
- has a matmul without the target's matrix instructions (HMMA on 8.0, HGMMA on 9.0, UTC*MMA on
  10.0).

Must run without TRITON_INTERPRET. Exit code 0: all is green; 1: something is red; 2: usage.
"""

from __future__ import annotations

import math
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
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

from benchmarks.command import command_parser
from benchmarks.machine_code import TILES, instructions
from sd_kernels.average_triton import average_weights
from sd_kernels.launch import Launch, interpreted, recording
from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import SD_V2
from sd_kernels.spec import Backend, Inputs, OpSpec
from sd_kernels.targets import GPUS
from sd_perf.tools.results import Conditions, Provenance, Result, write

CONDITIONS: Conditions = {"batch": None, "dtype": "bfloat16", "cached": "nothing"}
"""of every row; a kernel compiled for an op's full-size calls"""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
INLINE_ASSEMBLY = re.compile(r"// begin inline asm\n.*?// end inline asm", re.DOTALL)
GLOBAL_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.(\S+)")


SCHEDULERS = 4
"""of a multiprocessor; each issues one instruction of one warp a clock"""
H100_CLOCK = 1.98e9
"""clocks a second at most: 67 TFLOP/s of float32 (data sheet) over 132 x 128 lanes x 2"""
AVERAGE = "average"
"""a kernel that is no op, named as if it were"""
TWO_SWEEPS = ("group_norm_backward_kernel", "group_norm_forward_kernel")
"""kernels in which one program makes a tile's statistics and another its result; backward has
a third kind that adds up sums, once a sample and block of channels, which is counted as well"""


@dataclass(frozen=True)
class Compiled:
    """One specialisation of one kernel, compiled for one target."""

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
    """the matrix instruction found, or `missing`; empty: the kernel has no matmul"""
    instructions: float | None = None
    """machine instructions of a thread for each element; None: not a kernel of `TILES`"""
    bytes: float | None = None
    """of device memory for each element, where every tensor of the launch is moved once"""

    @property
    def ok(self) -> bool:
        """Whether nothing is red."""
        return not (
            self.stack_bytes or self.spills or self.narrow_lines or self.matrix == "missing"
        )


class SkipConvolutions(TorchDispatchMode):
    """Torch's convolutions return empty tensors; at full size a CPU would take hours for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        tensors_only = partial(pytree.tree_map_only, torch.Tensor)
        results = func(
            *tensors_only(lambda tensor: tensor.to("meta"), args),
            **(kwargs or {}),
        )
        return tensors_only(lambda result: torch.empty_like(result, device="cpu"), results)


def _ours(spec: OpSpec) -> Backend:
    """The backend with our Triton kernels, of an op that has one."""
    if spec.ours is None:
        raise ValueError(f"{spec.name} has no Triton kernels of ours")
    return spec.backend(spec.ours)


def launches_of(spec: OpSpec, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Case name and launch of every Triton kernel in the op's full-size calls.

    Forward and backward. The inputs are allocated and never touched.
    """
    function = _ours(spec).function(spec.name)
    for case in spec.cases:
        inputs = spec.inputs(case, Inputs(case, dtype, empty=True))
        with recording() as launches, SkipConvolutions():
            results = function(**inputs)
            results = results if isinstance(results, tuple) else (results,)
            outputs = [out for out in results if out.requires_grad]
            tensors = (value for value in inputs.values() if isinstance(value, torch.Tensor))
            leaves = [tensor for tensor in tensors if tensor.requires_grad]
            grads = [torch.empty_like(out) for out in outputs]
            if outputs:
                torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        yield from ((case.name, launch) for launch in launches)


def launches_of_average() -> Iterator[tuple[str, Launch]]:
    """The average of the weights, which is a kernel and no op: of bfloat16 and float32 weights."""
    N = -(-SD_V2.parameters // 64) * 64  # training's flat buffers are padded so
    average, rate = torch.empty(N), torch.empty(())
    weights: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
        "bfloat16": (torch.empty(N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.int16)),
        "float32 weights": (torch.empty(N), None),
    }
    for case, (values, remainders) in weights.items():
        with recording() as launches:
            average_weights(average, values, remainders, rate)
        yield from ((case, launch) for launch in launches)


def accesses_at_their_lines(*stage: Any) -> Any:
    """Hook of Triton's compiler that drops line numbers within inline assembly.

    Loads are inline assembly of several lines. LLVM counts on through them from the source line, so
    that a load would be found a few lines below itself.
    """
    if not stage:
        return "accesses at their lines", "1"  # part of the key of Triton's cache
    stages = stage[1]
    make_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: INLINE_ASSEMBLY.sub(
        lambda block: re.sub(r"\t\.loc\t.*\n", "", block.group()), make_ptx(source, metadata)
    )
    return None


def compile_for(launch: Launch, capability: int) -> tuple[str, Any, dict[str, Any]]:
    """Key of the specialisation, its source for the compiler, and the compiler's options.

    All three as Triton's launcher would make them. capability: 90 for compute capability 9.0.
    """
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
    """Compile one specialisation, and read what matters from its machine code."""
    triton.knobs.runtime.add_stages_inspection_hook = accesses_at_their_lines
    # A cached result may name the files of another checkout.
    triton.knobs.compilation.always_compile = True
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-g", "-c", file.name)
    narrow, wide = _accesses(sass)
    per_element = None
    if counted := tile_elements(launch):
        whole = launch.kernel.fn.__name__ in TWO_SWEEPS
        per_element = instructions(sass, whole) * 32 * compiled.metadata.num_warps / counted
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
        instructions=per_element,
        bytes=bytes_per_element(launch) if per_element else None,
    )


def tile_elements(launch: Launch) -> int:
    """Elements that a program works on at once; 0 for a kernel that is not in `TILES`."""
    names = TILES.get(launch.kernel.fn.__name__)
    return math.prod(launch.options[name] for name in names) if names else 0


def bytes_per_element(launch: Launch) -> float:
    """Bytes of all tensors of the launch for each element of the result."""
    tensors = [each for each in launch.arguments if isinstance(each, torch.Tensor)]
    elements = max(each.numel() for each in tensors)
    if launch.kernel.fn.__name__.startswith("geglu"):
        elements //= 2  # the largest tensor holds value and gate
    return sum(each.numel() * each.element_size() for each in tensors) / elements


def floors(row: Compiled) -> tuple[float, float] | None:
    """Picoseconds for each element on an H100: to issue its instructions, and to move its bytes."""
    if row.instructions is None or row.bytes is None:
        return None
    gpu = GPUS["h100"]
    issued = SCHEDULERS * 32 * gpu.multiprocessors * H100_CLOCK
    return row.instructions / issued * 1e12, row.bytes / gpu.bandwidth.value * 1e12


def _accesses(sass: str) -> tuple[set[str], int]:
    """Source lines of unexplained narrow accesses to global memory, and the number of wide ones.

    An access in an inlined function counts for the line in that function, not for its caller's.
    """
    place, narrow, wide = ("", 0), set(), 0
    for line in sass.splitlines():
        if mark := re.search(r'//## File "([^"]*)", line (\d+)', line):
            place = (mark.group(1), int(mark.group(2)))
        elif access := GLOBAL_ACCESS.search(line):
            if re.search("128|256", access.group(2)):
                wide += 1
            elif not _explained(*place):
                narrow.add(f"{'/'.join(Path(place[0]).parts[-2:])}:{place[1]} {access.group()}")
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
    """One row per distinct specialisation and target, where the op's kernels support the target."""
    rows: dict[tuple[str, int], Compiled] = {}
    kernels = {op: launches_of(all_ops()[op], dtype) for op in ops if op != AVERAGE}
    kernels |= {AVERAGE: launches_of_average()} if AVERAGE in ops else {}
    launches = [(op, *recorded) for op, found in kernels.items() for recorded in found]
    for (op, case, launch), capability in product(launches, targets):
        if op != AVERAGE and divmod(capability, 10) < _ours(all_ops()[op]).capability:
            continue
        key, source, options = compile_for(launch, capability)
        if (key, capability) not in rows:
            rows[key, capability] = inspect(
                op, case, launch, source=source, options=options, capability=capability
            )
    return list(rows.values())


def markdown(rows: list[Compiled]) -> str:
    """A table for the documentation: a line per kernel, with the range of its specialisations."""
    targets = sorted({row.target for row in rows})
    registers = [f"registers sm_{target}" for target in targets]
    rates = ["instructions", "issue, ps", "memory, ps"]
    head = ["kernel", *registers, "shared", "stack", "spills", *rates, "verdict"]
    kernels: dict[str, list[Compiled]] = {}
    for row in rows:
        kernels.setdefault(row.kernel, []).append(row)
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kernel, alike in kernels.items():
        red = {
            reason
            for row in alike
            if not row.ok
            for reason in (*row.narrow_lines, row.matrix, row.case)
        }
        line = [
            f"`{kernel}`",
            *(_span([row.registers for row in alike if row.target == each]) for each in targets),
            _span([row.shared_bytes for row in alike]),
            _span([row.stack_bytes for row in alike]),
            _span([row.spills for row in alike]),
            *_rates([row for row in alike if row.target == 90]),
            f"red: {'; '.join(sorted(filter(None, red)))}" if red else f"{len(alike)} green",
        ]
        table.append(f"| {' | '.join(line)} |")
    return "\n".join(table) + "\n"


def _rates(rows: list[Compiled]) -> tuple[str, str, str]:
    """Instructions for each element, and both floors of an H100, of the specialisations for it."""
    counted = [(row.instructions, *pair) for row in rows if (pair := floors(row))]
    columns = zip(*counted, strict=True) if counted else ((), (), ())
    instructions, issue, memory = ([f"{number:.3g}" for number in column] for column in columns)
    return _range(instructions), _range(issue), _range(memory)


def _range(numbers: list[str]) -> str:
    if not numbers:
        return "-"
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low} to {high}"


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "-"
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def row_line(row: Compiled) -> str:
    """A row as one line of text."""
    what = f"sm_{row.target} {row.op} {row.kernel} ({row.case})"
    if row.ok:
        return f"ok  {what}: {row.registers} registers, {row.wide_accesses} wide"
    return f"RED {what}: {row}"


def main() -> int:
    """Compile, print, write; returns the exit code."""
    with_triton = [*(name for name, spec in all_ops().items() if spec.ours), AVERAGE]
    targets = list(MATRIX_INSTRUCTIONS)
    parser = command_parser("ahead_of_time", __doc__)
    add = parser.add_argument
    names = f"default: all of {', '.join(with_triton)}"
    add("--ops", nargs="+", metavar="OP", choices=with_triton, default=with_triton, help=names)
    add("--targets", nargs="+", type=int, choices=targets, default=targets, help="default: all")
    add("--markdown", type=Path, help="write the table here")
    add("--output", type=Path, help="JSON file of all rows")
    options = parser.parse_args()
    if interpreted():
        words = "unset it, since only the compiler's path can be compiled"
        parser.error(f"TRITON_INTERPRET is set; {words}")
    rows = compile_all(options.ops, options.targets)
    for row in rows:
        print(row_line(row))
    green = f"{sum(row.ok for row in rows)} of {len(rows)} specialisations green"
    print(f"triton {triton.__version__}: {green}")
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    if options.output:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        machine = {"machine": f"{platform.machine()}, which compiles for GPUs that are not here"}
        provenance = Provenance.of_this_run("ahead_of_time", machine, versions)
        found = [{**CONDITIONS, **asdict(row)} for row in rows]
        write(options.output, Result("ahead_of_time", provenance, found))
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
