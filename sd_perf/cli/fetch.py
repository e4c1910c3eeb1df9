"""`sd-perf fetch`: data sets and networks that the benchmark needs, from the internet or a copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sd_perf.cli.console import CONSOLE, print_plain, table_console
from sd_perf.cli.options import require_between
from sd_perf.errors import UserError

if TYPE_CHECKING:
    from sd_perf.fetch.manifest import Artefact


def fetch(
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None,
    output_dir: Annotated[
        Path | None, tyro.conf.arg(aliases=["-o", "-d", "--download-path"], metavar="DIR")
    ] = None,
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="PATH|URL")] = None,
    check: bool = False,
    dry_run: bool = False,
    jobs: int = 4,
) -> int:
    """Fetch a data set or a network, verified and resumed; without a name, list what there is.

    A fetch that was stopped goes on where it was; files that are there and whole are not fetched
    again. By fetching you accept the terms that are printed.

    Args:
        name: what to fetch, such as stable-diffusion
        output_dir: folder to fetch into
        from_: a copy or mirror in place of the known sources: a file, a folder, or a URL (ending in
            .uri: MLCommons' format; in a slash: a folder)
        check: fetch nothing, and compare what is there with its digests; exits 1 where a file is
            missing or damaged
        dry_run: fetch nothing, and print files, size, terms and sources
        jobs: files fetched at once
    """
    from sd_perf.fetch.describe import description, list_of_all
    from sd_perf.fetch.manifest import artefact_named
    from sd_perf.fetch.web import MAX_JOBS

    require_between("--jobs", jobs, 1, MAX_JOBS)
    if name is None:
        table_console().print(list_of_all())
        return 0
    artefact = artefact_named(name)
    if dry_run:
        print_plain(*description(artefact, output_dir))
        return 0
    if output_dir is None:
        raise UserError(f"{name}: --output-dir is missing; name the folder to fetch into")
    if check:
        return _check(artefact, output_dir, jobs)
    return _fetch(artefact, output_dir, from_, jobs)


def _fetch(artefact: Artefact, folder: Path, origin_text: str | None, jobs: int) -> int:
    from sd_perf.fetch.fetch import Fetch, locked
    from sd_perf.fetch.places import origin
    from sd_perf.fetch.progress import Watch

    named = None if origin_text is None else origin(origin_text)
    print_plain(f"{artefact.name}: {artefact.holds}", f"terms: {artefact.terms}")
    watch = Watch(CONSOLE)
    with locked(folder):
        try:
            outcome = Fetch(artefact, folder, watch, origin=named).run(jobs)
        finally:
            watch.close()
    if outcome.failed:
        count = len(outcome.failed)
        some = "" if count == 1 else f" and {count - 1} more"
        raise UserError(
            f"{artefact.name}: could not be fetched: {outcome.failed[0]}{some}. "
            f"{artefact.advice(named is not None)}"
        )
    count = len(outcome.fetched) + len(outcome.present)
    were = len(outcome.present) if outcome.fetched else "all"
    there = f", {were} of which were there" if outcome.present else ""
    print_plain(f"{count} file{'s' * (count != 1)}{there} -> {folder}")
    return 0


def _check(artefact: Artefact, folder: Path, jobs: int) -> int:
    from sd_perf.fetch.check import check
    from sd_perf.fetch.fetch import locked

    faults = 0
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that was fetched into")
    with locked(folder):
        for name, fault in check(artefact, folder, jobs):
            faults += bool(fault)
            print_plain(f"{name}: {fault or 'good'}")
    return 1 if faults else 0
