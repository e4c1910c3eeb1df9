"""A hostile server, a client that asks again at once, and an artefact to fetch from it."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sd_perf.console import TextConsole
from sd_perf.fetch import web
from sd_perf.fetch.fetch import Fetch, Outcome, locked
from sd_perf.fetch.manifest import Artefact, File, Source
from sd_perf.fetch.progress import Watch
from tests.fetch.hostile_server import HostileServer, hostile_server

DATA = random.Random(7).randbytes(200_000)
OTHER = random.Random(8).randbytes(200_000)
QUICK = web.Patience(
    least_rate=1000,
    attempts=3,
    first_attempts=3,
    progress=1000,
    pause=0.01,
    longest=5,
)
"""asks again at once, and waits for a server as long as users do: a busy machine may be silent"""


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with hostile_server() as hostile:
        yield hostile


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE", QUICK)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """impatient(silence=2): a client that bears this for so many seconds only."""

    def make(**limits: float) -> None:
        monkeypatch.setattr(web, "PATIENCE", dataclasses.replace(QUICK, **limits))

    return make


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_file(name: str = "file", data: bytes = DATA) -> File:
    """A file of which size and digest are published."""
    return File(name, len(data), {"sha256": sha256(data)})


def an_artefact(*files: File, sources: tuple[str, ...] = (), **options: object) -> Artefact:
    return Artefact(
        name="things",
        holds="things",
        terms="none",
        files=files or (a_file(),),
        sources=tuple(map(Source, sources)),
        otherwise="make them yourself",
        **options,  # type: ignore[arg-type]
    )


def fetch(
    artefact: Artefact, folder: Path, origin: str | Path | None = None, jobs: int = 2
) -> Outcome:
    """What `sd-perf fetch` does; lines go to stdout."""
    watch = Watch(TextConsole(width=200))
    with locked(folder):
        return Fetch(artefact, folder, watch, origin=origin).run(jobs)
