"""RUN/report.html: one file that tells a run to a colleague. No scripts, nothing fetched."""

from __future__ import annotations

from html import escape
from pathlib import Path

from sd_perf.files import disk_errors, write_text
from sd_perf.optional import optional
from sd_perf.tools.html import document
from sd_perf.tools.report.headline import numbers, state
from sd_perf.tools.report.run_contents import RunContents, read_run
from sd_perf.tools.report.sections import SECTIONS


def write_report(folder: Path) -> Path:
    """Write `report.html` of a run folder, from what the folder holds; returns its path.

    UserError for a folder that is no run, a file in it that cannot be understood, or a disk that
    refuses; ConfigError where matplotlib is missing.
    """
    optional("matplotlib", "a report needs matplotlib", "report")
    html, path = _report(read_run(folder)), folder / "report.html"
    with disk_errors(path, "make room there, then make the report again"):
        write_text(path, html)
    return path


def _report(run: RunContents) -> str:
    """The whole page as HTML."""
    name = escape(run.folder.resolve().name)
    sections = "".join(f"<h2>{title}</h2>\n{section(run)}\n" for title, section in SECTIONS.items())
    head = f"<h1>{name}</h1>\n{state(run)}\n{numbers(run)}"
    return document(f"{name} – sd-perf", f"{head}\n{sections}")
