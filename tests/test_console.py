"""What others wrote reaches the terminal as text: notes, folders, keys, captions."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from sd_perf.console import TextConsole, styled
from sd_perf.visible import visible

PRODUCT = sorted((Path(__file__).parents[1] / "sd_perf").rglob("*.py"))
HOSTILE = (
    "[/]",
    "[bold]plain[/bold]",
    "[red",
    "[link=file:///etc/passwd]x[/link]",
    ":smile:",
    "100 % of [1, 2]",
    "back\\slash [\\/]",
)
"""what rich would obey, drop or refuse where its markup is on"""


def printed(*things: object, **options: object) -> str:
    console = TextConsole(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    console.print(*things, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_is_text(text: str) -> None:
    table = Table(text, title=text, show_header=True)
    table.add_row(text)
    assert printed(text) == f"{text}\n"
    assert printed(table).count(text) == 3
    assert printed(styled("bold", text)) == f"{text}\n"
    assert printed(Text.assemble(styled("red", text), text)) == f"{text}{text}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("over\rwritten\b", r"over\rwritten\x08"),
        ("\x9b31m", r"\x9b31m"),
        ("exe\u202egnp.", r"exe\u202egnp."),
        ("a\udcffb", r"a\udcffb"),
        ("a\x00b\x7f", r"a\x00b\x7f"),
        ("a\u2028b\tc", r"a\u2028b\tc"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    table = Table("head")
    table.add_row(text)
    assert visible(text) == shown and visible(visible(text)) == shown
    assert printed(text) == printed(styled("bold", text)) == f"{shown}\n"
    assert shown in printed(table)


def test_line_breaks() -> None:
    assert visible("a\nb") == r"a\nb" and visible("a\nb", keep="\n") == "a\nb"
    assert printed(styled("bold", "a\nb")) == "a\\nb\n"
    assert printed("two\nlines") == "two\nlines\n"


def test_letters_of_all_scripts_stay() -> None:
    text = "Häuser, 猫, кот, قط, 🐈‍⬛ – “quotes”"
    assert visible(text) == text


@pytest.mark.parametrize(
    ("use", "where"),
    [
        (
            r"rich\.console import (?!Group\b)|rich\.markup|rich import print|\bConsole\(",
            ["console.py"],
        ),
        (r"from_markup|markup=True|\.render_markup", []),
        # a tag of rich in a string: "[bold]", "[/]", "[dim red]"
        (
            r"""["'{ ]\[/?(bold|dim|italic|red|green|yellow|cyan|blue|magenta|reverse)[a-z ]*\]""",
            [],
        ),
        (r"\[/\]", []),
        (r"TextColumn\((?!.*markup=False)", []),
    ],
)
def test_no_other_way_to_markup(use: str, where: list[str]) -> None:
    """Only sd_perf/console.py makes a console, and nothing turns markup on."""
    users = [path.name for path in PRODUCT if re.search(use, path.read_text())]
    assert users == where
