"""What the shards of each data format are made of, and the rows of their index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""of a picture in a raw shard; where a sample has several, the first of these is taken"""

MAX_IMAGE_BYTES = 2**27
"""largest image file in a shard that is read; one of the most pixels has fewer bytes as PNG"""


@dataclass(frozen=True)
class ShardFormat:
    """The shards of one value of `data.format`."""

    suffix: str
    """of a shard's file name"""
    parts: dict[str, tuple[str, ...]]
    """{part of a sample: extensions of the files that may hold it}; none where the shard is no tar
    file"""
    optional: tuple[str, ...] = ()
    """parts that a sample may lack"""

    def row_type(self, key_bytes: int) -> np.dtype[Any]:
        """Dtype of the index's rows, for keys of at most `key_bytes` bytes."""
        fields: list[tuple[str, str]] = [("shard", "<i4")]
        for part in self.parts:
            fields += [(f"{part}_offset", "<i8"), (f"{part}_size", "<i8")]
        return np.dtype([*fields, ("key", f"S{max(1, key_bytes)}")])


FORMATS = {
    "moments": ShardFormat(
        ".tar",
        {"moments": ("npy",), "caption": ("txt",), "context": ("context.npy",)},
        optional=("context",),
    ),
    "raw": ShardFormat(".tar", {"picture": IMAGE_EXTENSIONS, "caption": ("txt",)}),
    "encoded": ShardFormat(
        ".safetensors", {"moments": (), "caption": (), "context": ()}, optional=("context",)
    ),
}
"""by `data.format`"""
