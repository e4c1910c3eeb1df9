"""What the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
HISTORY = ROOT / "docs/decisions.md"
"""says what was so when it was decided; an entry is not edited when a file moves"""
PATH = re.compile(r"`((?:sd_perf|kernels|benchmarks|tests|configs|scripts|docs|assets)/[\w./]*)`")
EXAMPLES = ("squared_relu",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    if page != HISTORY:
        named = {path for path in PATH.findall(text) if not any(word in path for word in EXAMPLES)}
        missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


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
