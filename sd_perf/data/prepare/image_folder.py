"""A folder of pictures: where its captions are, and which of its pictures have none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sd_perf.data.images import PICTURE_SUFFIXES
from sd_perf.data.prepare.caption_tables import read_table
from sd_perf.data.prepare.captioned_images import MAX_CAPTION_BYTES, CaptionedImage, check_caption
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.shards import find_files
from sd_perf.errors import DataError
from sd_perf.files import read_untrusted

TABLES = tuple(
    f"{name}.{suffix}" for name in ("captions", "metadata") for suffix in ("jsonl", "csv", "tsv")
)
"""tables of captions that are found by their names; `metadata` is that of Hugging Face"""
_KINDS = "metadata.jsonl or .csv, a .txt beside each picture, or raw shards (*.tar)"
_SHARDS = "raw shards (*.tar)"
_TEXTS = ".txt files beside the pictures"
Reader = Callable[[], list[CaptionedImage]]


@dataclass(frozen=True)
class ImageFolder:
    """The captioned images of a folder."""

    images: list[CaptionedImage]
    source: str
    """where the captions are, in words"""
    uncaptioned: list[Path] = field(default_factory=list)
    """pictures of the folder that have no caption"""


def read_images(
    folder: str | Path, captions: str | Path | None = None, allow_empty: bool = False
) -> list[CaptionedImage]:
    """The captioned images of a folder; see `read_folder`."""
    table = Path(captions) if captions else None
    return read_folder(Path(folder), table, allow_empty=allow_empty).images


def read_folder(
    folder: Path, captions: Path | None = None, *, column: str = "", allow_empty: bool = False
) -> ImageFolder:
    """The captioned images of a folder and what lies below it, but for hidden files.

    Captions are in raw shards (*.tar), in a table of TABLES (captions.jsonl may lie beside the
    folder), or in a .txt file beside each picture. `captions` names a table, or a folder whose .txt
    files have the pictures' names. Images of shards and tables keep their order, others are sorted
    by name. Raises DataError for a folder without captions or with captions in two places, and as
    `read_raw_shards` and `read_table` do.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the folder of the images")
    files = list(_files(folder))
    pictures = _pictures(files)
    if captions is None:
        found = _sources(folder, files, pictures, column, allow_empty)
        source, read = _only(folder, found, files)
        images = read()
    elif captions.is_dir():
        source = f".txt files of {captions}"
        texts = _texts(list(_files(captions)), captions)
        images = _read_texts(pictures, folder, texts, allow_empty)
    else:
        source = str(captions)
        images = read_table(captions, folder, column=column, allow_empty=allow_empty)
    if not images:
        raise DataError(
            f"{folder}: none of its {len(pictures):,} pictures has a caption in {source}"
        )
    named = {image.path for image in images}
    return ImageFolder(images, source, [path for path in pictures if path not in named])


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and what lies below it, by their names' ends."""
    return _pictures(_files(folder))


def has_captions(folder: Path) -> bool:
    """Whether a folder has captions that `read_folder` would find, in one place or several."""
    files = list(_files(folder))
    return bool(_sources(folder, files, _pictures(files), "", True))


def _pictures(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]


def _files(folder: Path) -> Iterator[Path]:
    """The files in and below a folder by name, without hidden ones. Links to folders are followed;
    a folder that was met before is passed over."""
    seen = set()
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            state = Path(parent).stat()
            if (state.st_dev, state.st_ino) in seen:
                folders.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
            yield from (Path(parent, name) for name in sorted(names) if name[0] != ".")
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be looked into ({error.strerror}); let it be read, or move "
            "it away"
        ) from error


def _raise(error: OSError) -> None:
    raise error


def _sources(
    folder: Path, files: list[Path], pictures: list[Path], column: str, allow_empty: bool
) -> dict[str, Reader]:
    """Every place where a folder's captions may be, in words, and what reads them."""
    found: dict[str, Reader] = {}
    if find_files(folder):
        found[_SHARDS] = partial(read_raw_shards, folder, allow_empty)
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for table in (path for path in files if path.name in TABLES):
        words = str(table) if table.parent == folder else f"{table.name} in folders below it"
        groups.setdefault(words, []).append((table, table.parent))
    beside = folder.absolute().parent / TABLES[0]
    if not found and not groups and beside.is_file():
        groups[str(beside)] = [(beside, folder)]
    for words, tables in groups.items():
        found[words] = partial(_read_tables, tables, column=column, allow_empty=allow_empty)
    texts = _texts(files, folder)
    if any(_name(picture, folder) in texts for picture in pictures):
        found[_TEXTS] = partial(_read_texts, pictures, folder, texts, allow_empty)
    return found


def _only(folder: Path, found: dict[str, Reader], files: list[Path]) -> tuple[str, Reader]:
    """The one place where captions are; DataError where there are none or several."""
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        first, second, *_ = found
        texts = f"; --captions {folder} takes the .txt files" if _TEXTS in found else ""
        raise DataError(
            f"{folder}: captions are in two places, {first} and {second}; name one of the tables "
            f"by --captions, or move one away{texts}"
        )
    others = [path.name for path in files if path.suffix.lower() in (".jsonl", ".csv", ".tsv")]
    table = f"name {others[0]} by --captions" if others else "write one or name the captions file"
    raise DataError(f"{folder} has no captions.jsonl in it or beside it, nor {_KINDS}; {table}")


def _read_tables(tables: list[tuple[Path, Path]], **options: Any) -> list[CaptionedImage]:
    """The images of several tables, each with the folder that its names are relative to."""
    return [image for table, folder in tables for image in read_table(table, folder, **options)]


def _texts(files: list[Path], folder: Path) -> dict[str, Path]:
    """The .txt files, by the names of the pictures they belong to."""
    return {_name(path, folder): path for path in files if path.suffix.lower() == ".txt"}


def _name(path: Path, folder: Path) -> str:
    """The path of a file within a folder, without its extension."""
    return str(path.relative_to(folder).with_suffix(""))


def _read_texts(
    pictures: list[Path], folder: Path, texts: dict[str, Path], allow_empty: bool
) -> list[CaptionedImage]:
    """The pictures that have a text file: all that is in it is their caption."""
    images = []
    for picture in pictures:
        if (text := texts.get(_name(picture, folder))) is None:
            continue
        content = read_untrusted(
            text, MAX_CAPTION_BYTES, remedy="shorten or remove it", kind=DataError
        )
        try:
            caption = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8; save it as UTF-8") from error
        check_caption(caption, where=str(text), allow_empty=allow_empty)
        file = str(picture.relative_to(folder))
        images.append(CaptionedImage(picture, (caption,), str(picture), {"file": file}))
    return images
