"""The sources of one fetch: which of them has a file, and which is asked first."""

from __future__ import annotations

import threading
from pathlib import Path

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import Artefact, File
from sd_perf.fetch.places import Place, locate
from sd_perf.fetch.progress import Watch
from sd_perf.fetch.web import Refused, Web


class Offers:
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
