"""The captions file of a folder of images: what is read, and bad input."""

from __future__ import annotations

import pytest

from sd_perf.data.prepare.image_folder import read_images
from sd_perf.errors import DataError


def test_reading_captions(photographs):
    images = read_images(photographs)
    assert [image.path.name for image in images] == ["a.png", "b.jpg", "c.png"]
    assert images[1].captions == ("picture 1", "other words for 1")
    assert images[1].metadata == {"file": "b.jpg", "width": 30, "flickr_url": "u"}
    inside = photographs / "captions.jsonl"
    inside.write_text('{"file": "c.png", "caption": "one"}\n\n')
    assert [image.captions for image in read_images(photographs)] == [("one",)]
    assert len(read_images(photographs, photographs.parent / "captions.jsonl")) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'file': 'a.png'}", "line 2 is not JSON"),
        (b'["a.png"]', "line 2 does not name an image"),
        (b'{"captions": ["x"]}', "line 2 does not name an image"),
        (b'{"file": "a.png"}', r"line 2 \(a.png\) has no captions"),
        (b'{"file": "a.png", "captions": []}', r"line 2 \(a.png\) has no captions"),
        (b'{"file": "a.png", "captions": "x"}', r"line 2 \(a.png\) has no captions"),
        (
            b'{"file": "a.png", "captions": ["x", 3]}',
            r"line 2 \(a.png\): caption 3 is not a string",
        ),
        (b'{"file": "a.png", "caption": "  "}', r"line 2 \(a.png\): caption is empty"),
        (b'{"file": "a.png", "caption": "caf\xe9"}', "line 2 is not UTF-8"),
        (
            b'{"file": "a.png", "caption": "\\ud800"}',
            r"line 2 \(a.png\): caption cannot be written as UTF-8",
        ),
        (
            b'{"file": "a.png", "caption": "' + b"\xc3\xa9" * 2049 + b'"}',
            "line 2 .* 4098 bytes, more than 4096",
        ),
        (b'{"file": "gone.png", "caption": "x"}', "line 2 names gone.png, which is not in"),
    ],
)
def test_bad_lines(photographs, line, message):
    file = photographs / "captions.jsonl"
    file.write_bytes(b'{"file": "a.png", "caption": "x"}\n' + line)
    with pytest.raises(DataError, match=message) as error:
        read_images(photographs)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        read_images(tmp_path / "absent")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"has no captions\.jsonl"):
        read_images(tmp_path / "images")
    with pytest.raises(DataError, match="cannot be read"):
        read_images(tmp_path, tmp_path / "absent.jsonl")
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no lines"):
        read_images(tmp_path)
