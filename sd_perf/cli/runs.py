"""`sd-perf watch` and `compare`: runs as they stand, one while it trains, several side by side."""

from __future__ import annotations

from pathlib import Path

import tyro

from sd_perf.cli.console import CONSOLE, print_plain, table_console
from sd_perf.cli.options import RunFolder
from sd_perf.errors import UserError


def watch(run: RunFolder, once: bool = False, every: float = 2.0) -> int:
    """Show a run while it trains: loss, samples/s, time left, last checkpoint and scores.

    Reads the run folder alone, so it works from another machine that sees it, and over
    `ssh -t HOST sd-perf watch RUN`. Where the output is no terminal it prints a line per change.
    Ends when the run is complete.

    Args:
        run: run folder
        once: print the state and exit
        every: seconds between looks
    """
    from sd_perf.tools.watch.watch_run import show_once, watch_run

    if not 0.1 <= every <= 3600:
        raise UserError(f"--every: {every} cannot be used; it must be between 0.1 and 3600 seconds")
    if once:
        show_once(run, table_console())
    else:
        watch_run(run, CONSOLE, every)
    return 0


def compare(
    run: tyro.conf.Positional[tuple[Path, ...]], output: Path = Path("compare.html")
) -> int:
    """Compare runs: their results, curves over each other, and the keys of their configs that
    differ; a table here, and a page.

    Args:
        run: two to eight run folders
        output: HTML file to write, in place of the one that is there
    """
    from sd_perf.tools.report.comparison import read_runs
    from sd_perf.tools.report.comparison_page import write_page
    from sd_perf.tools.report.comparison_tables import tables

    runs = read_runs(run)
    table_console().print(*tables(runs), sep="\n")
    write_page(runs, output)
    print_plain(output)
    return 0
