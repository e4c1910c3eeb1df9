"""Samples of a data set on one HTML page, to look at: pictures with their captions."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from sd_perf.data.show import Example
from sd_perf.files import disk_errors, write_text
from sd_perf.tools.html import document, figure, quiet
from sd_perf.visible import visible


def write_contact_sheet(examples: Iterable[Example], folder: Path, output: Path) -> int:
    """Write the examples of `folder` as a page; returns how many there are."""
    figures = [_figure(example) for example in examples]
    title = escape(visible(folder.absolute()))
    body = (
        f"<h1>{title}</h1>\n"
        + quiet(f"{len(figures)} samples, evenly spread over the folder")
        + f'\n<div class="strip">\n{chr(10).join(figures)}\n</div>\n'
    )
    with disk_errors(output, "make room there or name another file"):
        write_text(output, document(title, body))
    return len(figures)


def _figure(example: Example) -> str:
    data = base64.b64encode(example.jpeg).decode("ascii")
    image = f'<img alt="" src="data:image/jpeg;base64,{data}">' if example.jpeg else ""
    caption = escape(visible(example.caption)) or ("<i>empty caption</i>" if image else "")
    words = f"{escape(visible(example.name))}: {escape(visible(example.remark))}"
    return figure(image, f"{caption}<br><small>{words}</small>")
