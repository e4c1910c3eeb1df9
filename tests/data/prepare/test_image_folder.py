"""Where captions are found in a folder of pictures, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from sd_perf.data.prepare.image_folder import ImageFolder, read_folder
from sd_perf.data.prepare.scenes import write_scene_shards
from sd_perf.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names of pictures, nested and with spaces; and what a Mac and a notebook left."""
    folder = tmp_path / "my pictures"
    names = ("b 1.JPG", "ü.png", "deep/er/c.webp", "deep/._c.webp", ".hidden/d.png", "notes.txt")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def captions_of(found: ImageFolder) -> dict[str, tuple[str, ...]]:
    return {image.metadata["file"]: image.captions for image in found.images}


def test_a_text_beside_each_picture(folder):
    (folder / "b 1.txt").write_text("\ufeffone\n", encoding="utf-8")
    (folder / "deep/er/c.TXT").write_text("two lines\nof text")
    found = read_folder(folder)
    assert captions_of(found) == {"b 1.JPG": ("one",), "deep/er/c.webp": ("two lines\nof text",)}
    assert found.uncaptioned == [folder / "ü.png"] and ".txt" in found.source
    (folder / "ü.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"ü\.txt is not UTF-8"):
        read_folder(folder)
    (folder / "ü.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"ü\.txt: caption is empty"):
        read_folder(folder)
    assert captions_of(read_folder(folder, allow_empty=True))["ü.png"] == ("",)


def test_texts_of_another_folder(folder, tmp_path):
    (tmp_path / "texts/deep/er").mkdir(parents=True)
    (tmp_path / "texts/deep/er/c.txt").write_text("c")
    found = read_folder(folder, tmp_path / "texts")
    assert captions_of(found) == {"deep/er/c.webp": ("c",)}
    with pytest.raises(DataError, match="none of its 3 pictures has a caption in"):
        read_folder(folder, folder / "deep" / "er")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "b 1.JPG", "text": "a, b"}\n{"file_name": "ü.png", "text": "c"}',
        ),
        ("metadata.csv", '\ufefffile_name,Text\r\nb 1.JPG,"a, b"\r\nü.png,c\r\n'),
        ("captions.csv", 'prompt;image\n"a, b";b 1.JPG\n\nc;ü.png\n'),
        ("captions.tsv", "id\tfilename\tcaption\n1\tb 1.JPG\ta, b\n2\tü.png\tc\n"),
    ],
)
def test_tables(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    found = read_folder(folder)
    assert captions_of(found) == {"b 1.JPG": ("a, b",), "ü.png": ("c",)}
    assert found.uncaptioned == [folder / "deep/er/c.webp"]
    assert found.source == str(folder / name)


def test_names_spelled_otherwise_in_unicode(folder):
    name = unicodedata.normalize("NFD", "ü.png")
    (folder / "captions.jsonl").write_text(json.dumps({"file": name, "caption": "x"}))
    assert read_folder(folder).images[0].path == folder / "ü.png"


def test_tables_of_the_folders_below(folder):
    """As Hugging Face has them: names are relative to the table."""
    line = {"file_name": "c.webp", "text": "x"}
    (folder / "deep/er/metadata.jsonl").write_text(json.dumps(line))
    (folder / "other").mkdir()
    (folder / "other/d.png").touch()
    (folder / "other/metadata.jsonl").write_text(json.dumps({"file_name": "d.png", "text": "y"}))
    found = read_folder(folder)
    assert [image.path.name for image in found.images] == ["c.webp", "d.png"]
    assert len(found.uncaptioned) == 2


def test_two_places_are_named_and_one_can_be_chosen(folder):
    (folder / "b 1.txt").write_text("of the text")
    table = folder / "metadata.csv"
    table.write_text("file_name,text\nb 1.JPG,of the table\n")
    with pytest.raises(DataError, match=r"in two places, .*metadata\.csv and \.txt files") as error:
        read_folder(folder)
    assert f"--captions {folder} takes the .txt files" in str(error.value)
    assert captions_of(read_folder(folder, table)) == {"b 1.JPG": ("of the table",)}
    assert captions_of(read_folder(folder, folder)) == {"b 1.JPG": ("of the text",)}
    write_scene_shards(folder, 2, seed=0)
    with pytest.raises(DataError, match=r"in two places, raw shards"):
        read_folder(folder)


def test_two_columns_are_named_and_one_can_be_chosen(folder):
    table = folder / "metadata.csv"
    table.write_text("file_name,text,prompt,Title\nb 1.JPG,t,p,q\n")
    with pytest.raises(DataError, match=r"two columns, text and prompt; .* --caption-column text"):
        read_folder(folder)
    for column, caption in (("prompt", "p"), ("Title", "q")):
        assert read_folder(folder, column=column).images[0].captions == (caption,)
    with pytest.raises(
        DataError, match=r"\(file_name, text, prompt, title\) has no column of capt"
    ):
        read_folder(folder, column="words")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no column of files; call it file or file_name or"),
        ("name,text\n", "has no column of files"),
        ("file_name,words\n", "has no column of captions; call it captions or"),
        ("file_name,text,text\n", "has 'text' twice"),
        ("file_name,text" + 100_000 * ",c" + "\n", "has 'c' twice"),
        ("file_name,text\n", "has no lines; it needs a header and a row"),
        ("file_name,text\n../x.png,a\n", "line 2 names '../x.png', which lies outside"),
        ("file_name,text\n/etc/x.png,a\n", "line 2 names '/etc/x.png', which lies outside"),
        ("file_name,text\nb 1.JPG\n", r"line 2 \(b 1\.JPG\) has no captions"),
        ("file_name,text\nb 1.JPG,\n", r"line 2 \(b 1\.JPG\): caption is empty"),
        ("file_name,text\nb 1.JPG,a\ngone.png,b\n", r"line 3 names gone\.png, which is not in"),
        ('file_name,text\nb 1.JPG,"a\n', "line 2 is no row of a table"),
        ("file_name,text\nb 1.JPG," + 200_000 * "a", "is no row of a table"),
    ],
)
def test_bad_tables(folder, content, sentence):
    table = folder / "metadata.csv"
    table.write_text(content)
    with pytest.raises(DataError, match=sentence) as error:
        read_folder(folder)
    assert str(error.value).startswith(str(table)) and "\n" not in str(error.value)
    table.write_bytes(b"file_name,text\nb 1.JPG,caf\xe9\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_folder(folder)


def test_folders_that_are_linked(folder, tmp_path):
    """They are read, once each, and a link to a folder above does no harm."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far/z.png").touch()
    (tmp_path / "far/z.txt").write_text("z")
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "deep/loop").symlink_to(folder)
    assert captions_of(read_folder(folder)) == {"far/z.png": ("z",)}


def test_no_captions(folder):
    with pytest.raises(DataError, match=r"has no captions\.jsonl in it or beside it, nor metadata"):
        read_folder(folder)
    (folder / "labels.csv").write_text("file,caption\nb 1.JPG,a\n")
    with pytest.raises(DataError, match=r"name labels\.csv by --captions"):
        read_folder(folder)
    assert len(read_folder(folder, folder / "labels.csv").images) == 1
