"""Raw shards: tar files of images and captions, the benchmark's data before it is encoded.

img2dataset writes them: `<key>.jpg`, `<key>.txt` (caption) and `<key>.json` (not read) per sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from sd_perf.data.formats import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES
from sd_perf.data.prepare.captioned_images import MAX_CAPTION_BYTES, CaptionedImage
from sd_perf.data.samples import parse_caption, require_caption_size
from sd_perf.data.shards import find_files
from sd_perf.data.tar_files import group_by_key
from sd_perf.errors import BadSampleError, DataError


def read_raw_shards(folder: str | Path, allow_empty: bool = False) -> list[CaptionedImage]:
    """Captioned images of a folder's *.tar shards, in the order of the shards.

    The images are not read, only located. Raises DataError, with shard and key, for a shard that
    cannot be read, a sample without image or caption, and a caption that is not UTF-8, too long, or
    empty (unless allow_empty).
    """
    images = []
    for path in find_files(Path(folder)):
        with path.open("rb") as shard:
            for key, files in group_by_key(path).items():
                images.append(_image(path, shard, key, files=files, allow_empty=allow_empty))
    if not images:
        raise DataError(f"{folder} holds no raw shards with images in them")
    return images


def _image(
    path: Path, shard: BinaryIO, key: str, *, files: dict[str, tuple[int, int]], allow_empty: bool
) -> CaptionedImage:
    """One sample of a raw shard; `files` are its files as {extension: (byte offset, size)}."""
    where = f"{path}: sample {key}"
    place = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
    if place is None or "txt" not in files:
        raise DataError(
            f"{where} needs an image ({', '.join(IMAGE_EXTENSIONS)}) and a .txt; it has "
            f"{', '.join(files)[:200]}"
        )
    if place[1] > MAX_IMAGE_BYTES:
        raise DataError(
            f"{where}: the image has {place[1]:,} bytes, more than {MAX_IMAGE_BYTES:,}; remove it"
        )
    offset, size = files["txt"]
    shard.seek(offset)
    try:
        require_caption_size(size, MAX_CAPTION_BYTES)
        caption = parse_caption(
            shard.read(size), max_bytes=MAX_CAPTION_BYTES, allow_empty=allow_empty
        )
    except BadSampleError as error:
        raise DataError(f"{where}: {error}") from error
    return CaptionedImage(
        path=path,
        captions=(caption,),
        where=where,
        metadata={"file": f"{path.name}/{key}"},
        place=place,
    )
