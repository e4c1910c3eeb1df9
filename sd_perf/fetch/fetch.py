"""Fetches an artefact: which files are missing, from where, several at once, and what is told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sd_perf.errors import UserError
from sd_perf.fetch.download import DRAFTS, Draft, copy, download, require_room
from sd_perf.fetch.manifest import Artefact, File
from sd_perf.fetch.places import Place, locate
from sd_perf.fetch.progress import Watch
from sd_perf.fetch.receipt import Receipt, fault_of
from sd_perf.fetch.unpack import unpack
from sd_perf.fetch.web import Ended, Refused, Web, short
from sd_perf.files import disk_errors, flush

IN_A_ROW = 3
"""files that fail, or arrive damaged, one after the other before a fetch ends"""

GO_ON = "make room there and run the same command again, which goes on from what is kept"


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
        self._offers = _Offers(artefact, origin, self.web, watch)
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
        missing = [file for file in self._offers.files() if not self._is_there(file)]
        need = self._require_room(missing)
        if missing:
            self.watch.begin(need, len(missing))
            self._work_through(missing, jobs)
        if self.artefact.unpack and not self.outcome.failed:
            for file in self.artefact.files:
                unpack(self.folder / file.name, self.folder, self.folder / DRAFTS, self.watch)
        with contextlib.suppress(OSError):  # it is not there, or holds drafts
            (self.folder / DRAFTS).rmdir()
        return self.outcome

    def _is_there(self, file: File) -> bool:
        """Whether a file is in the folder, whole; one that is not is named, and fetched again."""
        path = self.folder / file.name
        if not path.is_file():
            return False
        if not self._receipt.vouches_for(file):
            self.watch.say(f"{file.name}: is there; comparing its bytes")
            fault, sha256 = fault_of(path, file)
            if fault:
                self.watch.say(f"{file.name}: {fault}; it is fetched again")
                self._receipt.forget(file.name)
                return False
            if file.digests:
                self._receipt.add(self.artefact.name, file, None, sha256)
            else:
                self.watch.say(f"{file.name}: is taken as it is, since no digest is known")
        self.outcome.present.append(file.name)
        return True

    def _require_room(self, missing: list[File]) -> int:
        """UserError where the disk has less room than is known to be needed.

        Returns the bytes of the missing files, about, or 0 where they are not known.
        """
        sizes = [file.size for file in missing]
        need = sum(size or 0 for size in sizes)
        if None in sizes and self.artefact.about:
            need = self.artefact.about * len(missing) // max(1, len(self.artefact.files))
        kept = sum(Draft(self.folder, file.name).size for file in missing)
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
            for thread in threads:
                thread.join(1)
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
        """Fetch one file from the first source that gives it whole."""
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
            self._count(damaged=True, file=file.name, where=place.where)
            self._offers.pass_over(number)
        reasons = reasons or self._offers.reasons
        sentence = f"{file.name}: {'; '.join(reasons)}"
        with self._lock:
            self.outcome.failed.append(sentence)
        self._count(damaged=True, file=file.name)

    def _from(self, place: Place) -> bool:
        """Fetch a file from a place and give it its name; False where it arrived damaged."""
        file, draft = place.file, Draft(self.folder, place.file.name)

        def progress(have: int, total: int | None) -> None:
            self.watch.update(file.name, have, total)

        with disk_errors(self.folder, GO_ON):
            receive = copy if isinstance(place.where, Path) else download
            receive(self.web, place.where, file, draft, progress)  # type: ignore[operator]
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
        how = f"{_names(file)} as published" if file.digests else "not verified: no digest is known"
        self.watch.done(file.name, how)
        return True

    def _count(self, damaged: bool, file: str = "", where: str | Path = "") -> None:
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


class _Offers:
    """The sources of one fetch, in order; each is looked at when it is first needed."""

    def __init__(
        self, artefact: Artefact, origin: str | Path | None, web: Web, watch: Watch
    ) -> None:
        self._artefact, self._web, self._watch = artefact, web, watch
        self._named = origin is not None
        self._origins: list[str | Path] = (
            [origin] if origin is not None else [source.url for source in artefact.sources]
        )
        self._places: dict[int, dict[str, Place]] = {}
        self._refused: set[tuple[int, str]] = set()
        self.reasons: list[str] = []
        """why sources have it not"""
        self._first = 0
        self._lock = threading.RLock()

    def files(self) -> list[File]:
        """The files that the first source with all of them has; UserError where none has."""
        for number, origin in enumerate(self._origins):
            if places := self._look(number):
                self._first = number
                self._watch.say(f"from {origin}")
                return [place.file for place in places.values()]
        raise UserError(
            f"{self._artefact.name}: no source has it ({'; '.join(self.reasons)}). {self.advice()}"
        )

    def next(self, name: str) -> tuple[int, Place] | None:
        """The source to take a file from now, and where; None where none is left."""
        with self._lock:
            count = len(self._origins)
            for number in ((self._first + step) % count for step in range(count)):
                place = self._look(number).get(name)
                if place is not None and (number, name) not in self._refused:
                    return number, place
        return None

    def refuse(self, number: int, name: str) -> None:
        """Remember that a source does not give a file."""
        with self._lock:
            self._refused.add((number, name))

    def pass_over(self, number: int) -> None:
        """Prefer the source after this one, from which a file came damaged."""
        with self._lock:
            if self._first == number:
                self._first = (number + 1) % len(self._origins)

    def advice(self) -> str:
        """What to do when no source gives what is wanted."""
        return self._artefact.advice(self._named)

    def _look(self, number: int) -> dict[str, Place]:
        """The places of the files at a source; none where it refuses."""
        with self._lock:
            if number not in self._places:
                try:
                    origin = self._origins[number]
                    found = locate(self._artefact, origin, self._web, named=self._named)
                except Refused as refusal:
                    found = []
                    self.reasons.append(str(refusal))
                    self._watch.say(refusal)
                self._places[number] = {place.file.name: place for place in found}
            return self._places[number]


def _named(place: Place) -> str:
    """A place as it is named in a sentence."""
    return str(place.where) if isinstance(place.where, Path) else short(place.where)


def _names(file: File) -> str:
    return " and ".join(algorithm.upper() for algorithm in file.digests)
