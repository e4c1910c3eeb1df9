"""What can be fetched, in words."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from sd_perf.fetch.manifest import Artefact, Source, artefacts


def list_of_all() -> Table:
    """Name, content and size of everything that can be fetched."""
    table = Table("name", "what it holds", "size", title="sd-perf fetch NAME --output-dir DIR")
    for artefact in artefacts().values():
        table.add_row(artefact.name, artefact.holds, _size(artefact))
    return table


def description(artefact: Artefact, folder: Path | None = None) -> list[str]:
    """Files, size, terms and sources of an artefact, a line each; and the room in a folder."""
    first, last = artefact.files[0].name, artefact.files[-1].name
    names = first if len(artefact.files) == 1 else f"{len(artefact.files)}, {first} ... {last}"
    lines = [
        f"{artefact.name}: {artefact.holds}",
        f"terms: {artefact.terms}",
        f"files: {names}",
        f"size: {_size(artefact) or 'not known before they are asked for'}",
        *(f"source: {source.url} ({_life(source)})" for source in artefact.sources),
        f"where none answers: {artefact.otherwise}",
    ]
    if folder is not None:
        existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())
        lines.append(f"folder: {folder}, {decimal(shutil.disk_usage(existing).free)} free")
    return lines


def _size(artefact: Artefact) -> str:
    if artefact.size is None:
        return ""
    return ("about " if artefact.about else "") + decimal(artefact.size)


def _life(source: Source) -> str:
    if source.gone:
        return f"gone since {source.gone}"
    return f"known to have lived on {source.seen}" if source.seen else "not known to have lived"
