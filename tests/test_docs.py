"""What the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import error_page
from sd_perf.stopping import CTRL_C, STOPPED

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
HISTORY = ROOT / "docs/decisions.md"
"""says what was so when it was decided; an entry is not edited when a file moves"""
PATH = re.compile(r"`((?:sd_perf|kernels|benchmarks|tests|configs|scripts|docs|assets)/[\w./]*)`")
EXAMPLES = ("squared_relu",)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    if page != HISTORY:
        named = {path for path in PATH.findall(text) if not any(word in path for word in EXAMPLES)}
        missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    """Anchors of other pages, and of the page itself."""
    for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert anchor in headings(target), f"{name}#{anchor}"


def test_commands_besides_sd_perf_exist() -> None:
    """`make TARGET`, `python -m benchmarks.NAME` and scripts, as the pages have them in code."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page != HISTORY)
    blocks = re.findall(r"^```.*?^```|`[^`\n]+`", text, re.M | re.S)
    code = "\n".join(block.strip("`") for block in blocks)
    targets = set(re.findall(r"^(?:\$ )?make ([a-z][a-z-]+)\b(?!/)", code, re.M))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and targets <= set(re.findall(r"^([a-z-]+):", makefile, re.M))
    modules = set(re.findall(r"-m benchmarks\.([a-z]\w*)", code))
    assert modules and all((ROOT / f"benchmarks/{name}.py").exists() for name in modules)
    scripts = set(re.findall(r"(?:\./|python )((?:scripts|slurm)/[\w./-]+|run_and_time\.sh)", code))
    assert scripts and not [name for name in scripts if not (ROOT / name).exists()]


def test_the_page_of_errors_is_current() -> None:
    """`python scripts/error_page.py` writes it anew."""
    page = error_page.PAGE.read_text(encoding="utf-8")
    assert error_page.updated(page) == page
    assert "### Run folders and checkpoints" in page and "move this checkpoint away" in page


def test_the_command_that_made_a_picture_stands_beside_it() -> None:
    """In a block of code, not further than three lines below the picture."""
    made = set()
    for page in PAGES:
        for picture, below in re.findall(
            r"!\[.*\]\((.+?)\)\n((?:.*\n){3})", page.read_text(encoding="utf-8")
        ):
            path = (page.parent / picture).relative_to(ROOT).as_posix()
            assert re.search(rf"^ {{4}}\w.* {re.escape(path)}$", below, re.M), path
            made.add(path)
    assert made == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/images/*")}


def test_every_exit_code_has_a_remedy() -> None:
    codes = {code for code, _ in error_page.kinds().values()} | {STOPPED, CTRL_C}
    assert codes < error_page.CODES.keys()
    assert {"UserError", "KernelError", "CheckpointError"} < error_page.kinds().keys()


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert listed == {page.name for page in PAGES} - {"README.md", "index.md"}


def test_each_change_is_answered_by_one_file() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page.partition("## Where do I change")[2], re.M)[2:]
    assert len(rows) >= 20
    for what, answer in rows:
        assert re.search(r"`[\w/<>.]+(\.py|/)`", answer), what


def test_tests_that_reliability_names_exist() -> None:
    """A promise whose test was renamed or dropped is none."""
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    held: dict[str, set[str]] = {}
    for file in ROOT.glob("tests/**/test_*.py"):
        held.setdefault(file.name, set()).update(
            re.findall(r"^def (test_\w+)", file.read_text(), re.M)
        )
    named = re.findall(r"`(?:tests/)?(?:[\w/]*?(test_\w+\.py))?(?:::)?(test_\w+)?`", page)
    tests = [(file, test) for file, test in named if test]
    assert {file for file, _ in named if file} <= held.keys()
    everywhere = set().union(*held.values())
    assert not [(f, t) for f, t in tests if t not in (held[f] if f else everywhere)]
    assert len(tests) > 60
