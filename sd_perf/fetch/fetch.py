"""Fetches an artefact: which files are missing, from where, several at once, and what is told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sd_perf.errors import UserError
from sd_perf.fetch.download import DRAFTS, Draft, copy, download, require_room
from sd_perf.fetch.manifest import Artefact, File
from sd_perf.fetch.offers import Offers
from sd_perf.fetch.places import Place
from sd_perf.fetch.progress import Watch
from sd_perf.fetch.receipt import Receipt, fault_of
from sd_perf.fetch.unpack import unpack
from sd_perf.fetch.web import Ended, Refused, Web, short
from sd_perf.files import disk_errors, flush

IN_A_ROW = 3
"""files that fail, or arrive damaged, one after the other before a fetch ends"""

_SECONDS_TO_END = 0.5
"""that a stop leaves to threads that read, all in all; a server may be silent for longer"""
_GO_ON = "make room there and run the same command again, which goes on from what is kept"


@dataclass
class Outcome:
    """What a fetch did."""

    fetched: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    """files that were there, whole"""
    failed: list[str] = field(default_factory=list)
    """a sentence for each file that no source gave"""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The right to fetch into a folder, which is made; UserError where another process has it."""
    with disk_errors(folder, "choose another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another sd-perf fetch writes to it; wait for it") from error
        except OSError:  # no flock on this file system: then nobody is kept out
            pass
        yield
    finally:
        os.close(descriptor)


class Fetch:
    """One fetch of an artefact into a folder."""

    def __init__(
        self,
        artefact: Artefact,
        folder: Path,
        watch: Watch,
        *,
        origin: str | Path | None = None,
        web: Web | None = None,
    ) -> None:
        self.artefact, self.folder, self.watch = artefact, folder, watch
        self.web = web or Web(watch.say)
        self.outcome = Outcome()
        self._offers = Offers(artefact, origin, self.web, watch)
        self._receipt = Receipt(folder)
        self._lock = threading.Lock()
        self._in_a_row = self._at_work = 0
        self._error: BaseException | None = None
        self._idle = threading.Event()

    def run(self, jobs: int) -> Outcome:
        """Fetch what is missing, `jobs` files at once.

        Raises UserError where no source has the files, where three files in a row fail or arrive
        damaged, and where the disk takes no more. Drafts stay, for the next fetch to go on from.
        """
        if not self._is_vouched_for():
            self._fetch_missing(jobs)
        if self.artefact.unpack and not self.outcome.failed:
            for file in self.artefact.files:
                unpack(self.folder / file.name, self.folder, self.folder / DRAFTS, self.watch)
        with contextlib.suppress(OSError):  # it is not there, or holds drafts
            (self.folder / DRAFTS).rmdir()
        return self.outcome

    def _is_vouched_for(self) -> bool:
        """Whether all files are there by the receipt, so that no source need be asked."""
        files = {file.name: file for file in self.artefact.files}
        files |= {file.name: file for file in self._receipt.recorded(self.artefact.name)}
        if not all(map(self._receipt.vouches_for, files.values())):
            return False
        self.outcome.present = list(files)
        return True

    def _fetch_missing(self, jobs: int) -> None:
        missing = []
        for file in self._offers.files():
            if self._receipt.vouches_for(file):
                self.outcome.present.append(file.name)
            else:
                missing.append(file)
        need = self._require_room(missing)
        self.watch.begin(need, len(missing))
        self._work_through(missing, jobs)

    def _require_room(self, missing: list[File]) -> int:
        """UserError where the disk has less room than is known to be needed.

        Returns the bytes of the missing files, about, or 0 where they are not known.
        """
        sizes = [file.size for file in missing]
        need = sum(size or 0 for size in sizes)
        if None in sizes and self.artefact.about:
            need = self.artefact.about * len(missing) // len(self.artefact.files)
        there = (self.folder / file.name for file in missing)
        kept = sum(path.stat().st_size for path in there if path.is_file())
        kept += sum(Draft(self.folder, file.name).size for file in missing)
        unpacked = need if self.artefact.unpack else 0
        require_room(self.folder, max(0, need - kept) + unpacked)
        return need

    def _work_through(self, missing: list[File], jobs: int) -> None:
        """Fetch files in `jobs` threads; a stop or an error ends them all."""
        tasks: queue.SimpleQueue[File] = queue.SimpleQueue()
        for file in missing:
            tasks.put(file)
        self._at_work = min(jobs, len(missing))
        # Threads that wait for a silent server must not keep the process: they are daemons.
        threads = [
            threading.Thread(target=self._worker, args=(tasks,), daemon=True)
            for _ in range(self._at_work)
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._idle.wait(0.1):
                self.watch.tick()
        finally:
            self.web.ended.set()
            end = time.monotonic() + _SECONDS_TO_END
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
            self.watch.tick()
        if self._error is not None:
            raise self._error

    def _worker(self, tasks: queue.SimpleQueue[File]) -> None:
        try:
            while not self.web.ended.is_set():
                self._fetch_file(tasks.get_nowait())
        except (queue.Empty, Ended):
            pass
        except BaseException as error:
            self._error = self._error or error
            self._idle.set()
        finally:
            with self._lock:
                self._at_work -= 1
                if not self._at_work:
                    self._idle.set()

    def _fetch_file(self, file: File) -> None:
        """Fetch one file, if it is not there whole, from the first source that gives it whole."""
        if self._is_whole(file):
            return
        reasons: list[str] = []
        while (offered := self._offers.next(file.name)) is not None:
            number, place = offered
            try:
                arrived = self._from(place)
            except Refused as refusal:
                reasons.append(f"{_named(place)}: {refusal}")
                self.watch.say(f"{file.name}: {reasons[-1]}")
                self._offers.refuse(number, file.name)
                continue
            if arrived:
                self._count(damaged=False)
                return
            self._count(damaged=True, file=file.name, where=_named(place))
            self._offers.pass_over(number)
        reasons = reasons or self._offers.reasons
        sentence = f"{file.name}: {'; '.join(reasons)}"
        with self._lock:
            self.outcome.failed.append(sentence)
        self._count(damaged=True, file=file.name)

    def _is_whole(self, file: File) -> bool:
        """Whether a file that was there is whole; one that is not is named."""
        path = self.folder / file.name
        if not path.is_file():
            return False
        self.watch.verifying(file.name)
        fault, sha256 = fault_of(path, file, lambda: self.web.rest(0))
        if fault:
            self.watch.say(f"{file.name}: is there, but {fault}; it is fetched again")
            self._receipt.forget(file.name)
            return False
        if file.digests:
            self._receipt.add(self.artefact.name, file, None, sha256)
        how = _verified(file) if file.digests else "taken as it is, since no digest is known"
        self.watch.done(file.name, path.stat().st_size, f"was there, {how}")
        with self._lock:
            self.outcome.present.append(file.name)
        return True

    def _from(self, place: Place) -> bool:
        """Fetch a file from a place and give it its name; False where it arrived damaged."""
        file, draft = place.file, Draft(self.folder, place.file.name)

        def progress(have: int, total: int | None) -> None:
            self.watch.update(file.name, have, total)

        with disk_errors(self.folder, _GO_ON):
            if isinstance(place.where, Path):
                copy(self.web, place.where, file, draft, progress)
            else:
                download(self.web, place.where, file, draft, progress)
            self.watch.verifying(file.name)
            fault, sha256 = fault_of(draft.path, file, lambda: self.web.rest(0))
            if fault:
                draft.discard()
                self.watch.say(f"{file.name}: arrived damaged from {_named(place)}: {fault}")
                return False
            flush(draft.path)
            draft.take(self.folder / file.name)
            flush((self.folder / file.name).parent)
            self._receipt.add(self.artefact.name, file, str(place.where), sha256)
        with self._lock:
            self.outcome.fetched.append(file.name)
        self.watch.done(file.name, (self.folder / file.name).stat().st_size, _verified(file))
        return True

    def _count(self, damaged: bool, file: str = "", where: str = "") -> None:
        """Count files that failed or arrived damaged in a row; UserError for the third."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if damaged else 0
            if self._in_a_row >= IN_A_ROW:
                what = (
                    f"damaged files came in a row from {where}"
                    if where
                    else "files failed in a row"
                )
                raise UserError(
                    f"{self.folder}: {IN_A_ROW} {what}, the last being {file}; what is whole is "
                    f"kept. {self._offers.advice()}"
                )


def _named(place: Place) -> str:
    """A place as it is named in a sentence."""
    return str(place.where) if isinstance(place.where, Path) else short(place.where)


def _verified(file: File) -> str:
    """What a whole file was compared with, in words."""
    if not file.digests:
        return "not verified: no digest is known"
    return f"{' and '.join(algorithm.upper() for algorithm in file.digests)} as published"
