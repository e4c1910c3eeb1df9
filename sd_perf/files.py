"""Files: written whole or not at all, and read as something that a stranger may have made.

A file that is read may be damaged, hostile, or no file at all. Whatever it holds, the readers here
give a value that can be used, or raise one UserError.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sd_perf.drafts import draft_folder
from sd_perf.errors import UserError

MAX_JSON_BYTES = 16 * 2**20
"""largest JSON file that is read"""
MAX_LINE_BYTES = 2**20
"""longest line that is read of a file of lines"""
RESTORE = "restore it from a copy, or remove it"
_MAX_DEPTH = 64
"""lists and objects within each other in JSON; the project's own files have six"""
_TOO_DEEP = f"lists or objects are nested deeper than {_MAX_DEPTH}"
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def disk_errors(path: Path, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an OSError of the block into one of `kind`: one sentence with path, cause and remedy.

    For blocks that write `path`: the disk may be full, read-only or missing.
    """
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path} cannot be written ({error.strerror or one_line(error)}); {remedy}"
        ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Write a file or folder in full before it takes the name `path`.

    Gives a path in a temporary folder beside `path`, with the same file name, for the block to
    write to. When the block ends, what it wrote is flushed to the disk and moved to `path`. Where
    anything fails, `path` stays as it was and nothing is left beside it.
    """
    with draft_folder(path.parent, path.name) as folder:
        draft = folder / path.name
        yield draft
        for part in (draft, *draft.rglob("*")):
            flush(part)
        draft.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all.

    Half of a surrogate pair, which a name on the disk can hold, is written as an escape.
    """
    with written_aside(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def opened_untrusted(
    path: Path, remedy: str = RESTORE, kind: type[UserError] = UserError
) -> Iterator[io.BufferedReader]:
    """Open a regular file to read its bytes, for a block.

    Raises an error of `kind`, with path and cause, where it cannot be opened, is no regular file,
    or the block has an OSError. Never waits, as opening a FIFO without a writer would.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise OSError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}")
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except OSError as error:
        raise kind(
            f"{_shown(path)}: cannot be read ({error.strerror or one_line(error)}); {remedy}"
        ) from error


def read_untrusted(
    path: Path,
    limit: int = MAX_JSON_BYTES,
    *,
    remedy: str = RESTORE,
    kind: type[UserError] = UserError,
) -> bytes:
    """The content of a regular file of at most `limit` bytes; else an error of `kind`."""
    with opened_untrusted(path, remedy, kind) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(f"it has more than {limit:,} bytes")
    return content


def untrusted_lines(path: Path, limit: int = MAX_LINE_BYTES, **errors: Any) -> Iterator[bytes]:
    """The lines of a file, without their ends, of at most `limit` bytes each; else UserError.

    `errors` are `remedy` and `kind` of `opened_untrusted`.
    """
    with opened_untrusted(path, **errors) as file:
        for number in itertools.count(1):
            line = file.readline(limit + 1)
            if len(line) > limit:
                raise OSError(f"line {number} has more than {limit:,} bytes")
            if not line:
                return
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def untrusted_text(
    path: Path,
    *,
    remedy: str,
    kind: type[UserError],
    encoding: str = "utf-8",
    errors: str = "strict",
    newline: str | None = None,
) -> Iterator[str]:
    """The lines of a text file, with their ends, of fewer than MAX_LINE_BYTES characters each.

    `encoding`, `errors` and `newline` are those of `open`. Raises an error of `kind` as
    `opened_untrusted` does, and UnicodeDecodeError.
    """
    with opened_untrusted(path, remedy, kind) as file:
        stream = io.TextIOWrapper(file, encoding, errors, newline)
        for number in itertools.count(1):
            line = stream.readline(MAX_LINE_BYTES)
            if len(line) == MAX_LINE_BYTES:
                raise OSError(f"line {number} has {MAX_LINE_BYTES:,} characters or more")
            if not line:
                return
            yield line


def is_absent(path: Path) -> bool:
    """Whether nothing has this name. A link to nothing, and what cannot be looked at, is there."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    except ValueError:  # no disk holds such a name: it has a NUL or half of a surrogate pair
        return True
    return False


def is_storable(path: str) -> bool:
    """Whether Linux can hold a path: no NUL, names of at most 255 bytes, UTF-8 or what it gave."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    names = data.split(b"/")
    return b"\0" not in data and len(data) < 4096 and max(map(len, names)) <= 255


def _shown(path: Path) -> str:
    """A path as it is quoted in a sentence: its end, where it is longer than any path can be."""
    text = str(path)
    return text if len(text) <= 1000 else f"...{text[-200:]}"


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file, see `parse_json`; None where there is no file.

    Raises UserError where it cannot be read.
    """
    if is_absent(path):
        return None
    content = read_untrusted(path, limit)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {RESTORE}") from error


def parse_json(content: bytes | str) -> Any:
    """The value of JSON text in UTF-8. ValueError, with the reason, for what is not JSON.

    Also for what Python takes and a reader trips over: NaN and infinity (and 1e400, which becomes
    infinity), integers beyond 64 bits, a key given twice, and nesting deeper than 64.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
            object_pairs_hook=_without_repeats,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _require_shallow(value)
    return value


def _integer(digits: str) -> int:
    # the length first: converting many digits is slow, and more than 4,300 is an error of Python
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"a number of {len(digits)} digits, which is none of 64 bits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:100]!r} is given twice")
    return value


def _require_shallow(value: Any) -> None:
    """ValueError for lists and objects nested deeper than _MAX_DEPTH."""
    layer = [value]
    for _ in range(_MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in layer)
        layer = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not layer:
            return
    raise ValueError(_TOO_DEEP)


def require_shape(value: Any, shape: Any, where: str) -> None:
    """UserError where a value from a JSON file has not this shape.

    The sentence begins with `where`, such as "runs/a/parity.json: is no parity record".

    A shape is `str`, `int`, `float` (any number), `bool` or `None`; a tuple of shapes, of which one
    must fit; a set of the values that may stand there; `[shape]` for a list of any length; or
    {key: shape} for an object, where other keys are free and `"key?"` may be absent.
    """
    if fault := misfit(value, shape):
        raise UserError(f"{where} ({fault}); {RESTORE}")


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """What is wrong with a value that has not the shape, in words; empty where it has.

    `place` is its own within a larger value, such as `rows[3].ok`.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name not in value and name == key:
                return f"{place or 'it'} lacks {name!r}"
            if name in value and (
                fault := misfit(value[name], inner, f"{place}.{name}".lstrip("."))
            ):
                return fault
        return ""
    if isinstance(shape, list) and isinstance(value, list):
        faults = (misfit(item, shape[0], f"{place}[{i}]") for i, item in enumerate(value))
        return next(filter(None, faults), "")
    options = shape if isinstance(shape, tuple) else (shape,)
    if any(_fits(value, option) for option in options):
        return ""
    return f"{place or 'it'} is {quoted(value)}, not {' or '.join(map(_in_words, options))}"


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if isinstance(shape, dict | list):
        return type(value) is type(shape) and not misfit(value, shape, "")
    if shape is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if shape is None else shape)


def _in_words(shape: Any) -> str:
    if isinstance(shape, set):
        return f"one of {', '.join(sorted(shape))}"
    kind = shape if isinstance(shape, type | None) else type(shape)
    names: dict[Any, str] = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        None: "null",
        list: "a list",
        dict: "an object",
    }
    return names[kind]


def quoted(value: Any, limit: int = 100) -> str:
    """A value as it is quoted in a sentence: its first `limit` characters, where it is longer."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def json_lines(objects: Iterable[dict[str, Any]]) -> str:
    """The objects as text, one JSON object per line."""
    return "".join(json.dumps(item) + "\n" for item in objects)


def first_error(error: BaseException) -> BaseException:
    """The first error of a chain: that of the operating system or the library."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def one_line(error: BaseException) -> str:
    """An exception's text on one line of at most 300 characters, to be quoted in a sentence."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
