"""Looks at every node of a job before the clock runs, and names those that would spoil the run.

One process per process of the run. Each gathers facts; rank 0 judges all of them together.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sd_perf
from sd_perf.cluster.timed_run import drop_caches
from sd_perf.config import Config
from sd_perf.distributed.launcher import read_place
from sd_perf.distributed.world import World, start_world, stop_world
from sd_perf.errors import UserError
from sd_perf.files import disk_errors, write_json

MAX_SKEW = 5.0
"""seconds that the clocks of two nodes may be apart, the time to compare them included"""
MAX_BUSY = 0.1
"""part of a GPU's memory that others may use"""
REDUCED_BYTES = 256 * 2**20
MAX_REDUCE_SECONDS = 60.0
"""for an all_reduce of so many bytes, after one that set up the connections"""
_PACKAGES = ("sd-perf", "torch", "triton", "numpy", "safetensors")


@dataclass(frozen=True)
class Facts:
    """What one process sees on its node."""

    node: str
    gpus: int
    gpu_busy: float
    """part of its GPU's memory that is in use"""
    versions: dict[str, str]
    files: dict[str, str]
    """{path: size and such, or why it cannot be used} of what training reads"""
    missing: tuple[str, ...]
    """those of `files` that cannot be used"""
    sees_results: bool
    """whether the token that rank 0 wrote to the folder of results is there"""
    clock: float
    """seconds since 1970"""


class UnfitNodesError(UserError):
    """Nodes that would spoil the run, in `nodes`."""

    def __init__(self, message: str, nodes: list[str]) -> None:
        super().__init__(message)
        self.nodes = nodes

    def __reduce__(self) -> Any:  # it is sent to the other ranks
        return type(self), (str(self), self.nodes)


def look(config: Config, report: Path, gpus_per_node: int, clear_caches: bool) -> str:
    """Look at all nodes of the job that this process is of; returns what was found, in words.

    Drops the nodes' file caches first where that is asked and allowed. Rank 0 writes to `report`
    whether all did (`caches_cleared`), and the names of `unfit` nodes. UnfitNodesError on rank 0
    where there are any; the other ranks exit with status 2. `gpus_per_node` is 0 on CPUs.
    """
    world = start_world(config.training.device, *config.run.patience)
    # The first process of each node does it for the others.
    dropped = clear_caches and (read_place().local_rank > 0 or drop_caches()[0])
    cleared = all(world.gather(dropped))

    def tell(unfit: list[str]) -> None:
        write_json(report, {"caches_cleared": cleared, "unfit": unfit})

    try:
        found = require_fit_nodes(config, world, report.parent, gpus_per_node)
    except UnfitNodesError as error:
        tell(error.nodes)
        raise
    if world.is_main:
        tell([])
    world.part()
    stop_world(world)
    return f"pre-flight: {found}; file caches {'dropped' if cleared else 'kept'}"


def require_fit_nodes(config: Config, world: World, results: Path, gpus_per_node: int) -> str:
    """`look`, with the processes joined and without the caches."""
    token = results / f".preflight_{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    token = world.on_main(lambda: _write(token))
    try:
        mine = gather_facts(config, world, token)
        told = [Facts(**fields) for fields in world.gather(asdict(mine))]
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)
    world.on_main(lambda: require_alike(told, gpus_per_node, results))
    seconds = max(world.gather(_reduce_seconds(world)))
    world.on_main(lambda: _require_fast(seconds, told))
    count = len({facts.node for facts in told})
    rate = REDUCED_BYTES / max(seconds, 1e-9) / 1e9
    timed = f"; all_reduce of {REDUCED_BYTES // 2**20} MB in {seconds:.2f} s ({rate:.1f} GB/s)"
    fit = f"nodes fit: {count}, processes: {len(told)}"
    return fit + (timed if world.size > 1 else "")


def _write(token: Path) -> Path:
    with disk_errors(token.parent, "choose another --results-dir"):
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    return token


def gather_facts(config: Config, world: World, token: Path) -> Facts:
    """What this process sees. All ranks call it."""
    files = {str(path): describe(path) for path in read_by(config)}
    busy = 0.0
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        busy = 1 - free / total
    sees_results = token.exists()
    world.max(0)  # all read their clocks after the last one has come
    return Facts(
        node_name(),
        torch.cuda.device_count(),
        busy,
        {name: _version(name) for name in _PACKAGES},
        {path: told for path, (told, _) in files.items()},
        tuple(path for path, (_, usable) in files.items() if not usable),
        sees_results,
        time.time(),
    )


def node_name() -> str:
    """The node's name as Slurm has it, else the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _version(package: str) -> str:
    if package == "sd-perf":
        return sd_perf.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def read_by(config: Config) -> Iterable[Path]:
    """The files and folders that training reads on every node."""
    data = config.data
    if data.format != "synthetic":
        yield Path(data.path)
    if data.format == "raw":
        yield Path(data.autoencoder)
    weights = config.text_encoder.weights
    if (config.encodes_text or data.drop_captions) and weights not in ("", "random"):
        yield Path(weights)


def describe(path: Path) -> tuple[str, bool]:
    """Sizes of a file, or of the files in a folder, as text to compare; and whether it is there."""
    try:
        if path.is_file():
            return f"{path.stat().st_size:,} bytes", True
        sizes = sorted((p.name, p.stat().st_size) for p in path.iterdir() if p.is_file())
    except OSError as error:
        return (error.strerror or "cannot be read").lower(), False
    if not sizes:
        return "an empty folder", False
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
    total = sum(size for _, size in sizes)
    return f"{len(sizes):,} files of {total:,} bytes (names and sizes {digest})", True


def require_alike(told: list[Facts], gpus_per_node: int, results: Path) -> None:
    """UnfitNodesError, with every fault by node, where a node is unfit or unlike the others."""
    faults: dict[str, list[str]] = defaultdict(list)
    for facts in told:
        for path in facts.missing:
            faults[facts.node].append(f"{path}: {facts.files[path]}")
        if facts.gpus and facts.gpu_busy > MAX_BUSY:
            share = f"{100 * facts.gpu_busy:.0f} %"
            faults[facts.node].append(f"{share} of a GPU's memory is taken by others")
        # One GPU: a launcher may show each process its own alone.
        if gpus_per_node and facts.gpus not in (1, gpus_per_node):
            faults[facts.node].append(f"{facts.gpus} GPUs where {gpus_per_node} are asked for")
        if not facts.sees_results:
            what = "is another folder here (a disk of this node's own?); results must be shared"
            faults[facts.node].append(f"{results}: {what}")
    there = [facts for facts in told if not facts.missing]
    for path in there[0].files if there else ():
        _compare(path, {facts.node: facts.files[path] for facts in there}, faults)
    for package in told[0].versions:
        _compare(package, {facts.node: facts.versions[package] for facts in told}, faults)
    early, late = min(told, key=_clock), max(told, key=_clock)
    if late.clock - early.clock > MAX_SKEW:
        ahead = f"its clock is {late.clock - early.clock:.1f} s ahead of {early.node}'s"
        faults[late.node].append(ahead)
    if faults:
        nodes = sorted(faults)
        each = [f"{node} is unfit ({'; '.join(dict.fromkeys(faults[node]))})" for node in nodes]
        raise UnfitNodesError(
            f"pre-flight: {', '.join(each)}; mend that, or submit with --exclude {','.join(nodes)}",
            nodes,
        )


def _clock(facts: Facts) -> float:
    return facts.clock


def _compare(what: str, values: dict[str, str], faults: dict[str, list[str]]) -> None:
    """Add a fault for each node whose value is not that of most; for all where there is no most."""
    counts: dict[str, int] = defaultdict(int)
    for value in values.values():
        counts[value] += 1
    usual = max(counts, key=lambda value: counts[value])
    is_tie = list(counts.values()).count(counts[usual]) > 1
    for node, value in values.items():
        if len(counts) > 1 and (is_tie or value != usual):
            others = "" if is_tie else f", {usual} elsewhere"
            faults[node].append(f"{what} {value}{others}")


def _reduce_seconds(world: World) -> float:
    """Seconds of an all_reduce over all processes; 0 in a run of one."""
    if world.size == 1:
        return 0.0
    tensor = torch.zeros(REDUCED_BYTES // 4, device=world.device)
    dist.all_reduce(tensor[:1])
    _finish(tensor)
    start = time.monotonic()
    dist.all_reduce(tensor)
    _finish(tensor)
    return time.monotonic() - start


def _finish(tensor: Any) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _require_fast(seconds: float, told: list[Facts]) -> None:
    if seconds > MAX_REDUCE_SECONDS:
        nodes = ",".join(sorted({facts.node for facts in told}))
        raise UserError(
            f"pre-flight: an all_reduce of {REDUCED_BYTES // 2**20} MB took {seconds:.0f} s over "
            f"{nodes}, at most {MAX_REDUCE_SECONDS:.0f} is in order; look at their network"
        )
