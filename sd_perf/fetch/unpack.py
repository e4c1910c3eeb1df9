"""Unpacks zip archives: into their folder and nowhere else, and each file whole or not at all."""

from __future__ import annotations

import lzma
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from sd_perf.errors import UserError
from sd_perf.fetch.download import require_room
from sd_perf.fetch.manifest import require_inside
from sd_perf.fetch.progress import Watch
from sd_perf.files import disk_errors, one_line

_BLOCK = 2**20
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    ArithmeticError,
    RuntimeError,
)
"""what zipfile raises for archives that are damaged, encrypted or of an unknown kind"""


def unpack(archive: Path, folder: Path, drafts: Path, watch: Watch) -> None:
    """Unpack what a zip archive holds and the folder lacks.

    Raises UserError for an archive that is damaged, or that has a link, a name that leaves the
    folder, or a name twice: then nothing of it is unpacked.
    """
    try:
        with (
            zipfile.ZipFile(archive) as file,
            disk_errors(folder, "make room there and run the same command again"),
        ):
            _unpack(file, archive, folder, drafts / "unpacking", watch)
    except _DAMAGED as error:
        raise UserError(
            f"{archive}: cannot be unpacked ({one_line(error)}); remove it and fetch it again"
        ) from error


def _unpack(file: zipfile.ZipFile, archive: Path, folder: Path, draft: Path, watch: Watch) -> None:
    members = _members(archive, file.infolist())
    total, have, unpacked = sum(info.file_size for info in members), 0, 0
    require_room(folder, sum(i.file_size for i in members if not _has_size(folder / i.filename, i)))
    watch.begin(total, 1)
    for info in members:
        if not _is_there(folder / info.filename, info):
            _extract(file, info, folder / info.filename, draft)
            unpacked += 1
        have += info.file_size
        watch.update(archive.name, have, total)
        watch.tick()
    if unpacked:
        os.sync()
    watch.done(archive.name, total, f"{unpacked:,} of {len(members):,} files unpacked")


def _members(archive: Path, infos: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The files of an archive; UserError where one of its members is not a plain file within."""
    members = [info for info in infos if not info.is_dir()]
    for info in infos:
        require_inside(info.filename.rstrip("/"), f"{archive}: the archive")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{archive}: its member {info.filename!r} is a link or a device")
    names = {info.filename for info in members}
    if len(names) < len(members):
        raise UserError(f"{archive}: has a member twice")
    return members


def _has_size(path: Path, info: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _is_there(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether a file has the size and the checksum of a member."""
    if not _has_size(path, info):
        return False
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum == info.CRC


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, draft: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, draft.open("wb") as file:
        while block := source.read(_BLOCK):  # its end is checked against the checksum
            file.write(block)
    draft.replace(target)
