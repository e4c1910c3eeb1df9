"""The files of a tar file that is a shard, by sample."""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sd_perf.data.tar_headers import Files, read_plain_headers
from sd_perf.errors import DataError
from sd_perf.files import one_line, opened_untrusted

_MEMBER = re.compile(rb"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
"""key and extension: as in webdataset, the key ends at the first dot of the base name. Hidden
files, such as the ._x that a Mac adds beside x, are no members of samples."""
_END_OF_ARCHIVE = bytes(1024)
"""a whole tar file ends with two blocks of 512 zero bytes"""
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""headers that are followed by a name or by attributes, which tarfile reads into memory"""
_MAX_LONG_HEADER = 2**16
_BLOCK = 2**20


class _BoundedTarInfo(tarfile.TarInfo):
    """A header of a tar file, which is refused where tarfile would read what it claims at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _LONG_HEADERS and info.size > _MAX_LONG_HEADER):
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


def _list_files(path: Path) -> Files:
    """Regular files of a tar file.

    DataError where it is no tar file, not a whole one, or holds what would be left out: links,
    devices, and whatever stands behind its end.
    """
    remedy = "fetch or make this shard again"
    with opened_untrusted(path, remedy, DataError) as stream:
        files = read_plain_headers(stream.fileno())
        if files is not None:
            return files
        try:
            members, end = _read_headers(stream)
        except Exception as error:  # tarfile meets damage with nearly any error
            raise DataError(
                f"{path} cannot be read as a tar file ({one_line(error)}); {remedy}"
            ) from error
        # tarfile takes any header it cannot read for the end of the archive, without an error.
        # So a truncated or damaged tar shows only by what stands at that place.
        stream.seek(end)
        whole = stream.read(len(_END_OF_ARCHIVE)) == _END_OF_ARCHIVE
        padding = all(not any(block) for block in iter(lambda: stream.read(_BLOCK), b""))
    if not whole:
        raise DataError(f"{path} is truncated or damaged at byte {end}; {remedy}")
    if not padding:
        raise DataError(
            f"{path} goes on behind the end of the archive at byte {end}, as files put together "
            "with cat do; unpack all parts and make one shard of them"
        )
    for member in members:
        if not (member.isdir() or member.isreg()) or member.issparse():
            raise DataError(
                f"{path}: {member.name[:200]} is a link, a device or a sparse file, which is not "
                "read; make the shard again of plain files (tar --dereference --hard-dereference)"
            )
    regular = [member for member in members if member.isreg()]
    places = [(member.offset_data, member.size) for member in regular]
    names = [os.fsencode(member.name) for member in regular]
    return Files(names, np.array(places, np.int64).reshape(-1, 2))


def _read_headers(stream: BinaryIO) -> tuple[list[tarfile.TarInfo], int]:
    """The members of a tar file, and the byte at which the last one ends."""
    members = []
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_BoundedTarInfo) as tar:
        end = 0
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"the header at byte {end} leads back")
            members.append(member)
            end = tar.offset
        return members, tar.offset


class Members(NamedTuple):
    """The files of a shard that belong to samples."""

    keys: list[bytes]
    """of the samples, in the order of the tar"""
    extensions: list[str]
    """in lower case"""
    sample: np.ndarray
    """(files,) numbers of the keys"""
    extension: np.ndarray
    """(files,) numbers of the extensions"""
    places: np.ndarray
    """(files, 2) int64: byte offset and size"""

    def column(self, extension: str) -> np.ndarray:
        """(samples, 2) int64: byte offset and size of each sample's file; zeros: it has none."""
        column = np.zeros((len(self.keys), 2), np.int64)
        if extension in self.extensions:
            chosen = self.extension == self.extensions.index(extension)
            column[self.sample[chosen]] = self.places[chosen]
        return column


def list_members(path: Path) -> Members:
    """The files of a tar file by key and extension; DataError where two have the same."""
    files = _list_files(path)
    keys: list[bytes] = []
    ends: list[bytes] = []
    for name in files.names:
        # Most names have no folder, and are split in a third of the time that _MEMBER takes.
        key, _, end = name.partition(b".")
        if b"/" in name:
            match = _MEMBER.fullmatch(name)
            key, end = match.groups() if match else (b"", b"")
        keys.append(key)
        ends.append(end)
    is_member = np.array([bool(key and end) for key, end in zip(keys, ends, strict=True)], bool)
    places = files.places[is_member]
    if not is_member.all():
        keys, ends = (list(itertools.compress(each, is_member)) for each in (keys, ends))
    extension_of = {end: os.fsdecode(end).lower() for end in dict.fromkeys(ends)}
    extensions = list(dict.fromkeys(extension_of.values()))
    codes = {end: extensions.index(extension) for end, extension in extension_of.items()}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    sample = np.array(list(map(numbers.__getitem__, keys)), np.int64)
    extension = np.array(list(map(codes.__getitem__, ends)), np.int64)
    _, first = np.unique(sample * len(extensions) + extension, return_index=True)
    if len(first) < len(keys):
        place = np.setdiff1d(np.arange(len(keys)), first)[0]
        raise DataError(
            f"{path}: {os.fsdecode(keys[place])}.{extension_of[ends[place]]} occurs twice; make "
            "the shard again with unique keys"
        )
    return Members(list(numbers), extensions, sample, extension, places)


def group_by_key(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """The files of a shard as {key: {extension: (byte offset, size)}}, in the order of the tar."""
    members = list_members(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {os.fsdecode(key): {} for key in members.keys}
    groups = list(samples.values())
    numbers = members.sample.tolist(), members.extension.tolist(), members.places.tolist()
    for sample, extension, (offset, size) in zip(*numbers, strict=True):
        groups[sample][members.extensions[extension]] = (offset, size)
    return samples
