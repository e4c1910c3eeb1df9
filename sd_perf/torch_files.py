"""Files of torch.save, looked at before torch unpacks them."""

from __future__ import annotations

import os
import zipfile
from typing import BinaryIO

_MAX_PICKLE_BYTES = 8 * 2**20
"""of names and shapes, without the tensors: Stable Diffusion v2's have 0.2 MB. A pickle becomes
some fifty times as many bytes of objects."""


def require_bounded(file: BinaryIO) -> None:
    """ValueError, with the reason, for a zip file that would unpack to more than it has.

    torch.save stores its members as they are, so a file with compressed members, or with members
    within each other, was made to fill the memory. A file that is no zip file passes.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\3\4":  # as torch tells
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its parts would take more bytes than it has")
    if any(m.filename.endswith(".pkl") and m.file_size > _MAX_PICKLE_BYTES for m in members):
        raise ValueError(f"its names and shapes take more than {_MAX_PICKLE_BYTES:,} bytes")
    file.seek(0)
