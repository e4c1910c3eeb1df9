"""Reading prompts: both kinds of file, and bad input."""

from __future__ import annotations

import pytest

from sd_perf.errors import DataError
from sd_perf.evaluation.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.tsv", 'image_id\tid\tcaption\n1\t2\ta "dog"\n3\t4\ta cat\n', ['a "dog"', "a cat"]),
        (
            "p.jsonl",
            '{"file": "a", "captions": ["x", "y"]}\n{"file": "b", "caption": "z"}\n',
            ["x", "z"],
        ),
    ],
)
def test_prompts(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, 2) == expected
    with pytest.raises(DataError, match=r"holds 2 captions, and evaluation\.num_prompts is 3"):
        read_prompts(tmp_path / name, 3)


@pytest.mark.parametrize(
    ("name", "text"), [("p.tsv", "a\tb\n1\t2\n"), ("p.jsonl", "{"), ("p.jsonl", '{"a": 1}')]
)
def test_bad_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"not a \.tsv with a column"):
        read_prompts(tmp_path / name, 1)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "absent.tsv", 1)
