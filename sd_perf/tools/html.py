"""HTML that the reports of runs and of parity are made of: no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any


def document(title: str, body: str) -> str:
    """A whole page with report.css in it. `title` and `body` are HTML, already escaped."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<style>\n{style}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )


def table(rows: Iterable[Iterable[Any]], head: tuple[str, ...] = ()) -> str:
    """A table. Cells are shown as text, escaped here; the column titles in `head` are HTML."""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    titles = "<tr>" + "".join(f"<th>{title}</th>" for title in head) + "</tr>" if head else ""
    return f"<table>{titles}{body}</table>"


def figure(content: str, caption: str) -> str:
    """HTML with a caption, which is HTML, too, below it."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def quiet(words: str) -> str:
    """A remark in small grey type. `words` is HTML, already escaped."""
    return f'<p class="quiet">{words}</p>'
