"""Reading prompts: both kinds of file, the dialect of the benchmark's, and bad input."""

from __future__ import annotations

import csv

import pytest

from sd_perf.errors import DataError
from sd_perf.evaluation.prompts import read_prompts

HARD = [
    'The movie ""Walk the Line"" is playing on a television',
    '"',
    '""quoted""',
    'starts plain, then says "stop"',
    "tabs\tin\tit",
    "two\nlines",
    "carriage\r\nreturn",
    'all of it: "a\tb"\n"c"',
    "apostrophe's, commas, and émigrés",
    "a lone # sign",
]
"""captions that a table must quote, and some that it need not"""


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


def test_quoted_captions_by_hand(tmp_path):
    """What the dialect means, written without a library."""
    rows = ['1\t"The movie ""Walk the Line"" is on"', '2\t"a\tb"', '3\t"a\nb"', '4\tb "c" d', ""]
    (tmp_path / "p.tsv").write_text("\ufeffid\tcaption\n" + "\n".join(rows), encoding="utf-8")
    expected = ['The movie "Walk the Line" is on', "a\tb", "a\nb", 'b "c" d']
    assert read_prompts(tmp_path / "p.tsv", 4) == expected


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_as_pandas_writes_and_reads(quoting, tmp_path):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    path = tmp_path / "p.tsv"
    table = pandas.DataFrame({"image_id": range(len(HARD)), "id": 7, "caption": HARD})
    table.to_csv(path, sep="\t", index=False, quoting=quoting)
    assert read_prompts(path, len(HARD)) == HARD
    assert read_prompts(path, len(HARD)) == pandas.read_csv(path, sep="\t")["caption"].tolist()


def test_the_benchmarks_captions(real_data):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    path = real_data / "coco_captions" / "captions_source.tsv"
    captions = pandas.read_csv(path, sep="\t")["caption"].tolist()
    assert read_prompts(path, len(captions)) == captions
    assert sum('"' in caption for caption in captions) > 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.tsv", "a\tb\n1\t2\n", r"not a \.tsv with a column `caption`"),
        ("p.tsv", "", r"not a \.tsv with a column `caption`"),
        ("p.tsv", "id\tcaption\n1\ta\n2\n", r"line 3 has 1 columns, and the first line names 2"),
        ("p.tsv", "id\tcaption\n1\ta\tb\n", r"line 2 has 3 columns"),
        ("p.tsv", 'id\tcaption\n1\t"a\nb"\n2\t\n', r"line 4 has no caption"),
        ("p.tsv", 'id\tcaption\n1\ta\n2\t"b\n3\tc\n', r"line 3 opens a quote that nothing closes"),
        ("p.tsv", f"id\tcaption\n1\t{'a' * 200_000}\n", r"not a \.tsv .*field larger"),
        ("p.tsv", "id\tcaption\n1\t" + 2_000_000 * "a", r"line 2 has 1,048,576 characters"),
        ("p.jsonl", 2_000_000 * "a", r"line 1 has 1,048,576 characters"),
        ("p.jsonl", "{", r"line 1 is not JSON"),
        ("p.jsonl", '\n{"a": 1}', r"line 2 has no caption"),
        ("p.jsonl", '{"captions": "hello"}', r"line 1 has no caption"),
        ("p.jsonl", '{"captions": []}', r"line 1 has no caption"),
        ("p.jsonl", '{"captions": [3]}', r"line 1 has no caption"),
        ("p.jsonl", '{"captions": [["a"]]}', r"line 1 has no caption"),
        ("p.jsonl", '{"captions": null, "caption": "a"}', r"line 1 has no caption"),
        ("p.jsonl", '{"caption": null}', r"line 1 has no caption"),
        ("p.jsonl", '{"caption": 1.5}', r"line 1 has no caption"),
        ("p.jsonl", '{"caption": " "}', r"line 1 has no caption"),
        ("p.jsonl", '["caption"]', r"line 1 has no caption"),
        ("p.jsonl", '{"caption": "\\ud800"}', r"line 1 has half of a surrogate pair"),
        ("p.jsonl", "[" * 100_000, r"line 1 is not JSON"),
    ],
)
def test_bad_prompts(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name, 1)


def test_no_text_and_no_file(tmp_path):
    (tmp_path / "p.tsv").write_bytes(b"id\tcaption\n1\t\xff\n")
    with pytest.raises(DataError, match=r"not a \.tsv .*utf-8"):
        read_prompts(tmp_path / "p.tsv", 1)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "absent.tsv", 1)
