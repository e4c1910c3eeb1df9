"""Triton's kernels, compiled on a machine without a GPU and carried to one that has it.

    python -m benchmarks.gpu_triton_cache --output build/triton_sm90.tar.xz [--ops geglu ...]

Compiling what `gpu_acceptance` launches takes minutes; finding it in Triton's cache takes seconds.
The key of a cached kernel is made of its source, signature and options, the versions of Triton and
ptxas, and Triton's own files. So pack with the Python version (3.12, say) and the Triton release of
the GPU machine; a kernel whose key differs there is compiled there, in as many processes as it has
cores. Where the files lie is no part of the key, but Triton notes each kernel's files by absolute
path (triton/runtime/cache.py): the archive holds names, and `unpack` writes paths again.

Must run without TRITON_INTERPRET. Exit code 0: all compiled; 1: a kernel did not; 2: usage.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.command import command_parser
from benchmarks.gpu_launches import Specialisation, specialisations
from sd_kernels.launch import interpreted
from sd_kernels.registry import all_ops
from sd_perf.files import one_line, written_aside

GROUP = "__grp__"
"""files of Triton's cache whose names begin with this list a kernel's files with absolute paths"""
KEPT = (".cubin", ".json")
"""endings of the files that a launch needs"""
MOST_PROCESSES = 16


class Prepared(NamedTuple):
    """What became of one kernel."""

    op: str
    folder: str
    """its folder in Triton's cache; empty: it could not be compiled"""
    found: bool
    """whether it was there before"""
    error: str = ""
    """why it could not be compiled"""


def prepare(cache: Path, ops: list[str], capability: int, processes: int) -> Iterator[Prepared]:
    """Compile every kernel that the cache lacks, in several processes; one `Prepared` for each.

    On a GPU machine also builds the host code that launches the kernel, where this release of
    Triton makes one for each signature. No process may have initialised CUDA before.
    """
    triton.knobs.cache.dir = str(cache)
    triton.knobs.compilation.store_binary_only = True
    work = specialisations(ops, capability)
    # Forked, so that each process has the recorded kernels, which cannot be pickled.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _keep, (work, capability)) as pool:
        yield from pool.map(_prepare, range(len(work)))


_work: list[Specialisation] = []
"""of a process of the pool"""
_target = GPUTarget("cuda", 90, 32)


def _keep(work: list[Specialisation], capability: int) -> None:
    global _work, _target
    _work, _target = work, GPUTarget("cuda", capability, 32)


def _prepare(number: int) -> Prepared:
    op, _, source, options = _work[number]
    events: list[dict[str, Any]] = []
    triton.knobs.compilation.listener = lambda **event: events.append(event)
    try:
        compiled = triton.compile(source, target=_target, options=options)
        if torch.cuda.is_available():
            triton.runtime.driver.active.launcher_cls(source, compiled.metadata)
    except Exception as error:  # the others are worth having
        return Prepared(op, "", False, one_line(error))
    [event] = events
    folder = Path(next(iter(event["metadata_group"].values()))).parent.name
    return Prepared(op, folder, event["cache_hit"])


def pack(cache: Path, folders: Iterable[str], output: Path) -> int:
    """Write these folders of a cache as a tar.xz, and return how many kernels they hold.

    Its first member, `manifest.json`, says which Triton and Python made them.
    """
    groups = sorted(
        group for folder in set(folders) for group in (cache / folder).glob(GROUP + "*")
    )
    manifest = {"triton": triton.__version__, "python": _python(), "kernels": len(groups)}
    with written_aside(output) as draft, tarfile.open(draft, "w:xz", preset=9) as archive:
        _add(archive, "manifest.json", json.dumps(manifest).encode())
        for group in groups:
            names = [name for name in _children(group) if name.endswith(KEPT)]
            folder = group.parent.name
            listed = {"child_paths": {name: name for name in names}}
            _add(archive, f"{folder}/{group.name}", json.dumps(listed).encode())
            for name in names:
                _add(archive, f"{folder}/{name}", (group.parent / name).read_bytes())
    return len(groups)


def unpack(archive: Path, cache: Path) -> dict[str, Any]:
    """Put the kernels of an archive of `pack` into a cache folder; returns its manifest.

    OSError or tarfile.TarError where the archive cannot be read.
    """
    with tarfile.open(archive, "r:xz") as opened:
        opened.extractall(cache, filter="data")
    for group in cache.glob(f"*/{GROUP}*"):
        paths = {name: str(group.parent / name) for name in _children(group)}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    manifest: dict[str, Any] = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _children(group: Path) -> list[str]:
    """Names of a kernel's files."""
    return list(json.loads(group.read_text(encoding="utf-8"))["child_paths"])


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _python() -> str:
    return "{}.{}".format(*sys.version_info)


def processes() -> int:
    """Processes that compile at once."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def main() -> int:
    """Compile, pack, print; returns the exit code."""
    with_triton = [name for name, spec in all_ops().items() if spec.ours]
    parser = command_parser("gpu_triton_cache", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="archive to write, .tar.xz")
    add("--capability", type=int, default=90, help="90 for compute capability 9.0 (default)")
    add("--ops", nargs="+", metavar="OP", choices=with_triton, default=with_triton)
    add("--cache", type=Path, default=Path("build/triton_cache"), help="Triton's cache folder")
    add(
        "--processes",
        type=int,
        default=processes(),
        help="compiling at once (default: %(default)s)",
    )
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set; unset it, since only the compiler makes kernels")
    prepared = []
    cache = options.cache.resolve()
    for each in prepare(cache, options.ops, options.capability, options.processes):
        prepared.append(each)
        if each.error:
            print(f"RED {each.op}: {each.error}", flush=True)
        elif len(prepared) % 25 == 0:
            print(f"{len(prepared)} kernels", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    count = pack(cache, [each.folder for each in prepared if each.folder], options.output)
    size = options.output.stat().st_size / 2**20
    found = sum(each.found for each in prepared)
    print(f"triton {triton.__version__}, Python {_python()}: {len(prepared)} kernels, {found} of")
    print(f"them in the cache before; {count} packed, {size:.2f} MiB, {options.output}")
    return int(any(each.error for each in prepared))


if __name__ == "__main__":
    sys.exit(main())
