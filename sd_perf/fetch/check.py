"""Compares what was fetched with its digests, byte for byte and without the network."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sd_perf.fetch.manifest import Artefact, File
from sd_perf.fetch.receipt import Receipt, fault_of
from sd_perf.fetch.web import Web


def check(artefact: Artefact, folder: Path, jobs: int) -> Iterator[tuple[str, str]]:
    """The name of each file that should be there, and what is wrong with it; empty if nothing.

    The digests are those published, and those of the receipt. A file that is not whole is taken
    out of the receipt, so the next fetch fetches it again.
    """
    receipt = Receipt(folder)
    recorded = {file.name: file for file in receipt.recorded(artefact.name)}
    files = [recorded.get(file.name, file) for file in artefact.files]
    known = {file.name for file in files}
    files += [file for name, file in recorded.items() if name not in known]
    web = Web()
    pool = ThreadPoolExecutor(jobs)
    try:
        faults = pool.map(lambda file: _fault(folder, file, web), files)
        for file, fault in zip(files, faults, strict=True):
            if fault:
                receipt.forget(file.name)
            yield file.name, fault
    finally:
        web.ended.set()
        pool.shutdown(cancel_futures=True)


def _fault(folder: Path, file: File, web: Web) -> str:
    path = folder / file.name
    if not path.is_file():
        return "is not there"
    fault, _ = fault_of(path, file, lambda: web.rest(0))
    return fault or ("" if file.digests else "cannot be checked: no digest is known of it")
