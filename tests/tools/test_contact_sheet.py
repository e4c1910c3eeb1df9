"""The page of `data show`: text of strangers stays text, and nothing is fetched."""

from __future__ import annotations

import re

from sd_perf.data.show import Example
from sd_perf.tools.contact_sheet import write_contact_sheet


def test_the_page(tmp_path):
    hostile = '<script>alert(1)</script>"\u202e'
    samples = [
        Example(hostile, hostile, b"\xff\xd8picture", "64x64 pixels"),
        Example("b", "", b"\xff\xd8other", "64x64 pixels"),
        Example("c", "", b"", "caption is <empty>"),
    ]
    output = tmp_path / "page.html"
    assert write_contact_sheet(samples, tmp_path / "<folder>", output) == 3
    page = output.read_text(encoding="utf-8")
    assert "<script" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert page.count("<img") == 2 and "<i>empty caption</i>" in page
    assert all(source.startswith("data:image/jpeg") for source in re.findall(r'src="([^"]*)', page))
    assert "caption is &lt;empty&gt;" in page and "&lt;folder&gt;" in page


def test_the_command(sd_perf, refused, tmp_path):
    scenes = ("--output", tmp_path / "raw", "--samples", 3, "--shards")
    assert sd_perf("data", "scenes", *scenes)[0] == 0
    output = tmp_path / "page.html"
    code, words, _ = sd_perf("data", "show", tmp_path / "raw", "--n", 2, "--output", output)
    assert code == 0 and words == f"2 samples -> {output}\n"
    assert output.read_text(encoding="utf-8").count("<figure>") == 2
    assert "is not a folder" in refused("data", "show", tmp_path / "no")
    assert "--n: 0 cannot be used" in refused("data", "show", tmp_path / "raw", "--n", 0)
