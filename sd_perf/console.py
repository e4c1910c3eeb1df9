"""The console of all commands. Text goes to it as text, whoever wrote it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from sd_perf.visible import visible


class TextConsole(Console):
    """A rich console without markup: strings are printed as they stand, brackets included.

    This holds for the cells and titles of tables, too. Control characters but line breaks are made
    visible; what may hold a line break of others (a path, a key) goes through `visible` first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """rich's way from a string to what is printed, for every string that it is given."""
        return super().render_str(visible(text, keep="\n"), **options)


def styled(style: str, text: object) -> Text:
    """Text in a style such as "bold red"; the text is printed as it stands, on one line."""
    return Text(visible(text), style)
