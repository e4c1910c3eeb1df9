"""Tables of captions: JSON lines, CSV and TSV, each row a picture's file and what is said of it."""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_perf.data.prepare.captioned_images import CaptionedImage, check_caption
from sd_perf.errors import DataError
from sd_perf.files import is_storable, one_line, parse_json, untrusted_lines, untrusted_text

FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
"""columns that may name the picture; the first of them that is there does"""
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")
"""columns that may hold what is said of it; `captions` is a list"""
_KEPT = ("width", "height", "license", "flickr_url")
"""entries of a row that are kept as metadata of its samples, beside the file's name"""
_REMEDY = "name the captions file"


def read_table(
    path: Path, images_dir: Path, *, column: str = "", allow_empty: bool = False
) -> list[CaptionedImage]:
    """The pictures that a table names, in its order; names are relative to images_dir.

    Files whose name ends in .csv or .tsv have a header; all others hold one JSON object per line.
    `column` is the one of the captions (default: the one of CAPTION_COLUMNS that is there). Raises
    DataError, with file and line, for a row that names no picture of the folder or has no caption,
    and for an empty caption unless allow_empty.
    """
    is_csv = path.suffix.lower() in (".csv", ".tsv")
    column = column.lower() if is_csv else column
    rows = _rows_of_csv(path, column) if is_csv else _rows_of_json(path)
    images = [
        _image(row, images_dir, where=where, column=column, allow_empty=allow_empty)
        for where, row in rows
    ]
    if not images:
        wanted = "a header and a row" if is_csv else "one JSON object"
        raise DataError(f"{path} has no lines; it needs {wanted} per image")
    return images


def _rows_of_json(path: Path) -> Iterator[tuple[str, Any]]:
    """File and line of each row, and its object."""
    lines = untrusted_lines(path, remedy=_REMEDY, kind=DataError)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, parse_json(line.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8; save the captions file as UTF-8") from error
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON ({one_line(error)}); write one JSON object per line"
            ) from error


def _rows_of_csv(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line of each row, and its values by the names of the header, in lower case."""
    lines = untrusted_text(path, remedy=_REMEDY, kind=DataError, encoding="utf-8-sig", newline="")
    try:
        first = next(lines, "")
        # Spreadsheets write semicolons where the comma is the decimal point.
        reader = csv.reader(lines, delimiter=max("\t,;", key=first.count), strict=True)
        names = [name.strip().lower() for name in next(csv.reader([first], reader.dialect), [])]
        _check_header(path, names, column)
        for values in reader:
            row: dict[str, Any] = dict(zip(names, values, strict=False))
            if "captions" in row:
                row["captions"] = [row["captions"]]
            if any(values):
                yield f"{path} line {reader.line_num + 1}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save the captions file as UTF-8") from error
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num + 1} is no row of a table ({error}); mend it"
        ) from error


def _check_header(path: Path, names: list[str], column: str) -> None:
    """DataError where a header lacks a column of files or captions, or has a name twice."""
    captions = (column,) if column else CAPTION_COLUMNS
    for wanted, right in (("files", FILE_COLUMNS), ("captions", captions)):
        if not set(right) & set(names):
            raise DataError(
                f"{path}: its header ({', '.join(names)[:200]}) has no column of {wanted}; call it "
                f"{' or '.join(right)}"
            )
    if twice := [name for name, times in Counter(names).items() if name and times > 1]:
        raise DataError(f"{path}: its header has {min(twice)[:100]!r} twice; rename one")


def _image(
    row: object, images_dir: Path, *, where: str, column: str, allow_empty: bool
) -> CaptionedImage:
    """The image of one row; `where` names file and line."""
    entry = row if isinstance(row, dict) else {}
    file = next((entry[name] for name in FILE_COLUMNS if name in entry), None)
    if not isinstance(file, str) or not file:
        raise DataError(
            f"{where} does not name an image; it needs an object with `file` and `captions`"
        )
    name = file[:300]
    if reason := _reason_against(Path(file)):
        raise DataError(f"{where} names {name!r}, {reason}; name a picture of {images_dir}")
    captions = _captions(entry, column, f"{where} ({name})")
    for caption in captions:
        check_caption(caption, where=f"{where} ({name})", allow_empty=allow_empty)
    # Names with accents have two spellings in Unicode: a Mac writes one, people type the other.
    spellings = (file, *(unicodedata.normalize(form, file) for form in ("NFC", "NFD")))
    path = next((images_dir / name for name in spellings if (images_dir / name).is_file()), None)
    if path is None:
        raise DataError(f"{where} names {name}, which is not in {images_dir}")
    metadata = {"file": file, **{name: entry[name] for name in _KEPT if name in entry}}
    return CaptionedImage(path, tuple(captions), where, metadata)


def _reason_against(file: Path) -> str:
    """Why a captions file may not name this picture; empty where it may."""
    if file.is_absolute() or ".." in file.parts:
        return "which lies outside of the folder"
    if file.name.startswith("._"):
        return "which a Mac wrote beside a picture and is none itself"
    if not is_storable(str(file)):
        return "which no disk can hold"
    return ""


def _captions(entry: dict[str, Any], column: str, where: str) -> list[Any]:
    """What a row says of its picture."""
    found = [name for name in ([column] if column else CAPTION_COLUMNS) if name in entry]
    if len(found) > 1:
        raise DataError(
            f"{where} has captions in two columns, {found[0]} and {found[1]}; choose one by "
            f"--caption-column {found[0]}"
        )
    value = entry[found[0]] if found else []
    captions = value if isinstance(value, list) or found == ["captions"] else [value]
    if not isinstance(captions, list) or not captions:
        wanted = f"`{column}`" if column else "a list `captions` or a string `caption`"
        raise DataError(f"{where} has no captions; it needs {wanted}")
    return captions
