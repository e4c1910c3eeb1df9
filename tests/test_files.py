"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.files import (
    disk_errors,
    is_absent,
    misfit,
    parse_json,
    read_json,
    read_untrusted,
    require_shape,
    write_json,
    write_text,
    written_aside,
)


def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_aside(path) as draft:
        assert draft.name == "a.txt"  # libraries read the format from it
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder(tmp_path):
    with written_aside(tmp_path / "unet") as draft:
        (draft / "deep").mkdir(parents=True)
        (draft / "deep" / ".hidden").write_text("x")
        assert not (tmp_path / "unet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
    assert (tmp_path / "unet" / "deep" / ".hidden").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), written_aside(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_full_disk(mount_tmpfs):
    disk = mount_tmpfs("size=64k")
    write_text(disk / "a.txt", "old")
    with (
        pytest.raises(UserError, match="No space left on device"),
        disk_errors(disk / "a.txt", "make room"),
    ):
        write_text(disk / "a.txt", 100_000 * "new")
    assert (disk / "a.txt").read_text() == "old" and [path.name for path in disk.iterdir()] == [
        "a.txt"
    ]


def test_two_writers_do_not_meet(tmp_path):
    path: Path = tmp_path / "a.txt"
    with written_aside(path) as first:
        first.write_text("first")
        write_text(path, "second")
    assert path.read_text() == "first"


def no_files(folder: Path) -> dict[str, str]:
    """Names in the folder that are no regular files, each with the reason against it."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("absent")
    (folder / "device").symlink_to("/dev/zero")
    return {
        "fifo": "it is a FIFO",
        "folder": "it is a folder",
        "loop": "Too many levels of symbolic links",
        "dangling": "No such file or directory",
        "device": "it is a device",
        300 * "x": "File name too long",
    }


def test_only_regular_files_are_read(tmp_path):
    for name, reason in no_files(tmp_path).items():
        for read in (read_untrusted, read_json):
            with pytest.raises(UserError) as error:
                read(tmp_path / name)
            assert f"{name}: cannot be read ({reason}); restore it" in str(error.value)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_untrusted(path, 5) == b"12345"
    with pytest.raises(UserError, match=r"cannot be read \(it has more than 4 bytes\)"):
        read_untrusted(path, 4)
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(UserError, match="more than 16,777,216 bytes"):
        read_json(path)


def test_what_is_absent(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("absent")
    for name in ("absent", "file/below", "a\0b", "\ud800"):
        assert is_absent(tmp_path / name), name
        assert read_json(tmp_path / name) is None
    assert not is_absent(tmp_path / "file") and not is_absent(tmp_path / "dangling")


@pytest.mark.parametrize("value", [None, True, -(2**63), 2**63 - 1, 1.5, "a\n", [{}], {"a": [1]}])
def test_what_is_written_as_json_is_read(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_nesting_up_to_the_limit():
    assert parse_json(64 * "[" + 64 * "]") is not None
    assert parse_json(json.dumps(1000 * "[{")) == 1000 * "[{"
    with pytest.raises(ValueError, match="nested deeper than 64"):
        parse_json(65 * "[" + 65 * "]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff", "can't decode byte"),
        (100_000 * b"[", "nested deeper"),
        (100_000 * b'{"a":', "nested deeper"),
        (b"9" * 5000, "a number of 5000 digits"),
        (b"-9223372036854775809", "none of 64 bits"),
        (b"1e400", "1e400 is too large"),
        (b"[NaN]", "NaN is no number"),
        (b"-Infinity", "-Infinity is no number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b"1 2", "Extra data"),
    ],
)
def test_json_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "shape", "fault"),
    [
        ({"a": 1}, {"a": int, "b?": str}, ""),
        ({"a": 1, "b": None}, {"a": float, "b?": (str, None)}, ""),
        ({"a": [1, 2.5]}, {"a": [float]}, ""),
        ({"a": True}, {"a": int}, "a is True, not a whole number"),
        ({"a": 1}, {"a": bool}, "a is 1, not true or false"),
        ({}, {"a": int}, "it lacks 'a'"),
        (
            {"a": {"b": [{}, {"c": "x"}]}},
            {"a": {"b": [{"c?": int}]}},
            "a.b[1].c is 'x', not a whole",
        ),
        ({"a": 5}, {"a": (str, None)}, "a is 5, not text or null"),
        ({"a": "z"}, {"a": {"x", "y"}}, "a is 'z', not one of x, y"),
        ([], {}, "it is [], not an object"),
        ({}, [int], "it is {}, not a list"),
        ({"a": 9 * "long text, "}, {"a": int}, "a is 'long"),
    ],
)
def test_shapes(value, shape, fault):
    found = misfit(value, shape)
    assert found.startswith(fault) and bool(found) == bool(fault)
    if fault:
        with pytest.raises(UserError, match=r"^a\.json: is no a \(.*\); restore it from a copy"):
            require_shape(value, shape, "a.json: is no a")


def test_half_of_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    write_text(tmp_path / "a", "a\ud800b")
    assert (tmp_path / "a").read_text() == "a\\ud800b"
