"""`sd-perf report`, `estimate`, `parity` and `doctor`: the commands of `sd_perf.tools`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import tyro

from sd_perf.cli.console import print_json, print_plain, table_console
from sd_perf.cli.options import (
    MAX_BATCH,
    GPUName,
    RunFolder,
    Settings,
    TargetName,
    require_between,
)
from sd_perf.distributed.launcher import MAX_RANKS
from sd_perf.runs.parity_record import DEFAULT_LEVELS, Level


def report(run: RunFolder) -> int:
    """Write RUN/report.html: curves, scores, pictures, verdict and configuration of a run in one
    file to pass on; `sd-perf report benchmarks DIR` does so for results of benchmarks.

    Args:
        run: run folder
    """
    from sd_perf.tools.report.write_report import write_report

    print_plain(write_report(run))
    return 0


def report_benchmarks(folder: tyro.conf.Positional[Path]) -> int:
    """Write DIR/benchmarks.html: tables and charts of all results of benchmarks in a folder.

    A file that is damaged, or no result of a benchmark, is named on the page and left out.

    Args:
        folder: folder of the *.json that `python -m benchmarks.NAME --output` wrote
    """
    from sd_perf.tools.report.benchmarks import write_benchmarks

    print_plain(write_benchmarks(folder))
    return 0


def estimate(
    config: Path,
    settings: Settings,
    gpu: GPUName = "h100",
    batch: int = 64,
    ranks: int = 1,
    nodes: int = 1,
    ledger: bool = False,
    png: Path | None = None,
    json: bool = False,
) -> int:
    """Predict time and memory of a training step on a GPU that need not be here: where the time
    goes, and what fits.

    All figures are of bfloat16, and a floor of time. The fused way is the fast network's step in
    one CUDA graph. Beside it stands the rate to expect, with the attention that is installed.

    Args:
        config: YAML preset
        settings: fields of the preset
        gpu: GPU to predict for
        batch: samples of a step of one GPU
        ranks: GPUs in all, whose communication is counted
        nodes: equal nodes that they are divided over
        ledger: trace the fast step instead, without a GPU: launches and bytes of every kernel, and
            each byte beyond the floor by its cause; fails where the step waits for the host
        png: file to draw the ms per sample to, by op
        json: print JSON
    """
    from sd_perf.tools.estimate.ledger import ledger as traced_step
    from sd_perf.tools.estimate.ledger_page import ledger_tables
    from sd_perf.tools.estimate.page import draw, tables
    from sd_perf.tools.estimate.predict import predict

    require_between("--batch", batch, 1, MAX_BATCH)
    require_between("--ranks", ranks, 1, MAX_RANKS)
    require_between("--nodes", nodes, 1, ranks)
    facts = predict(settings, gpu, batch=batch, ranks=ranks, nodes=nodes)
    if ledger:
        facts["ledger"] = traced_step(settings, gpu, batch)
    if png is not None:
        draw(facts, png)
    if json:
        print_json(facts)
    else:
        shown = ledger_tables(facts) if ledger else tables(facts)
        table_console().print(*shown, sep="\n")
    return 0


def parity(
    config: Path, settings: Settings, level: tuple[Level, ...] = (), json: bool = False
) -> int:
    """Compare the fast network with the plain one, level by level; exits 1 where one is further off
    than it may be.

    Writes parity.json and parity.html to the folder <run.dir>.parity. Runs with an MLPerf log need
    a green record.

    Args:
        config: YAML preset
        settings: fields of the preset
        level: levels to compare (default: all but trajectory, which takes minutes, and world, six
            whole runs)
        json: print the record as JSON
    """
    from sd_perf.tools.parity.run_parity import run_parity
    from sd_perf.tools.parity.terminal_report import terminal_report

    tell = functools.partial(print, file=sys.stderr, flush=True)
    record, folder = run_parity(settings, level or DEFAULT_LEVELS, tell)
    if json:
        print_json(record)
    else:
        lines = *terminal_report(record), f"{folder}/parity.html"
        table_console().print(*lines, sep="\n", soft_wrap=True)
    return 0 if record["ok"] else 1


def doctor(target: TargetName = "here", json: bool = False) -> int:
    """Say what is installed, what is missing and for what, what torch can compute on, and which
    kernels can be had.

    Args:
        target: GPU that kernels are chosen for
        json: print JSON
    """
    from sd_perf.tools.doctor import examine, screen

    findings = examine(target)
    if json:
        print_json(findings)
    else:
        table_console().print(*screen(findings), sep="\n")
    return 0
