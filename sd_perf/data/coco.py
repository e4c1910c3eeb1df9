"""COCO's validation captions and pictures, split and resized as the benchmark does.

The benchmark shuffles all captions, keeps the first one of each picture, takes 30,000 of them and
sorts these by the captions' ids. Its pictures are resized to squares without keeping their aspect
and saved as JPEG; FID's statistics are of these files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd_perf.data.images import decode_image
from sd_perf.data.threads import map_ahead
from sd_perf.drafts import draft_folder
from sd_perf.errors import DataError
from sd_perf.files import (
    disk_errors,
    misfit,
    one_line,
    opened_untrusted,
    parse_json,
    read_untrusted,
    write_text,
)
from sd_perf.optional import optional

SEED = 2023
"""of the benchmark's shuffle"""
NUM_SAMPLES = 30_000
SIZE = 512
"""rows and columns of a resized picture, pixels"""
_MAX_CAPTIONS_BYTES, _MAX_OBJECTS = 48 * 2**20, 1_000_000
"""largest captions file that is read, and most objects in it, which take some hundred bytes of
memory each; that of COCO 2014 has 32 MB and 243,000 of them"""
_END_OF_JPEG = b"\xff\xd9"
_JPEG_MODES = ("L", "RGB", "CMYK")
_NAMED = 20
"""pictures that a sentence names, at most"""


@dataclass(frozen=True)
class Caption:
    """A caption of a picture; the fields are the columns of the benchmark's table of prompts."""

    image_id: int
    id: int
    caption: str

    @property
    def file_name(self) -> str:
        """Name of the picture's file in COCO's val2014."""
        return f"COCO_val2014_{self.image_id:012}.jpg"


def read_coco_captions(path: Path) -> list[Caption]:
    """The captions in a file of COCO's format (captions_val2014.json), in the order of the file.

    Line breaks within captions are dropped and their ends stripped, as the benchmark does. Raises
    DataError for any other file.
    """
    remedy = "name captions_val2014.json of COCO's annotations"
    content = read_untrusted(path, _MAX_CAPTIONS_BYTES, remedy=remedy, kind=DataError)
    if content.count(b"{") + content.count(b"[") > _MAX_OBJECTS:
        raise DataError(f"{path}: has more than {_MAX_OBJECTS:,} objects; {remedy}")
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({one_line(error)}); {remedy}") from error
    shape = {"annotations": [{"image_id": int, "id": int, "caption": str}]}
    if fault := misfit(value, shape):
        raise DataError(f"{path}: is no file of COCO captions ({fault}); {remedy}")
    captions = [
        Caption(entry["image_id"], entry["id"], entry["caption"].replace("\n", "").strip())
        for entry in value["annotations"]
    ]
    if len({caption.id for caption in captions}) < len(captions):
        raise DataError(f"{path}: two captions have the same id; {remedy}")
    return captions


def split(captions: list[Caption], num_samples: int = NUM_SAMPLES) -> list[Caption]:
    """One caption each of `num_samples` pictures, as the benchmark draws them; sorted by id.

    The order before that is that of `pandas.DataFrame.sample(frac=1, random_state=2023)`, which
    takes NumPy's old generator; NumPy promises that its stream stays. Raises DataError where there
    are fewer pictures.
    """
    order = np.random.RandomState(SEED).permutation(len(captions))
    first: dict[int, Caption] = {}
    for number in order:
        first.setdefault(captions[number].image_id, captions[number])
    if len(first) < num_samples:
        raise DataError(
            f"--num-samples: {num_samples:,} cannot be used, since the captions are of "
            f"{len(first):,} pictures; ask for at most as many"
        )
    return sorted(list(first.values())[:num_samples], key=lambda caption: caption.id)


def tsv(captions: Iterable[Caption]) -> str:
    """The captions as the benchmark's table of prompts, as pandas writes it.

    Tab-separated with a header; a field is quoted only where it holds a tab, a quote or a line
    break, and quotes within it are doubled.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(Caption.__dataclass_fields__)
    writer.writerows((caption.image_id, caption.id, caption.caption) for caption in captions)
    return stream.getvalue()


def split_and_resize(
    images: Path,
    captions_file: Path,
    output: Path,
    table: Path,
    *,
    num_samples: int = NUM_SAMPLES,
    size: int = SIZE,
    threads: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write the benchmark's validation pictures to the folder `output` and their captions to
    `table`.

    Pictures that are there already, whole and of this size, are kept, so a run that was stopped
    goes on. The table is written last: where it is, all pictures are. `progress` is called with
    the pictures that are done, and of how many. Raises DataError for captions that cannot be used,
    and for pictures that are missing or damaged, after all others were written.
    """
    chosen = split(read_coco_captions(captions_file), num_samples)
    faults = []
    with disk_errors(output, "make room or choose another folder", DataError):
        output.mkdir(parents=True, exist_ok=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(output) as drafts:

            def resize(caption: Caption) -> str:
                name = caption.file_name
                return _resize(images / name, output / name, drafts / name, size)

            for done, fault in enumerate(map_ahead(resize, chosen, threads), 1):
                faults += [fault] if fault else []
                progress(done, num_samples)
    if faults:
        more = f"; and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
        raise DataError(
            f"{len(faults):,} of {num_samples:,} pictures cannot be used, so {table} is not "
            f"written; fetch them again: {'; '.join(faults[:_NAMED])}{more}"
        )
    with disk_errors(table, "make room there", DataError):
        write_text(table, tsv(chosen))


def _resize(source: Path, target: Path, draft: Path, size: int) -> str:
    """Write a picture resized, as JPEG of Pillow's default quality; why not, where it cannot be.

    Grey pictures stay grey, as in the benchmark.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    if _is_resized(Image, target, size):
        return ""
    try:
        with opened_untrusted(source, "fetch it again", DataError) as file:
            image = decode_image(file)
    except DataError as error:
        return str(error)
    except ValueError as error:
        return f"{source} cannot be decoded ({one_line(error)})"
    if image.mode not in _JPEG_MODES:
        return f"{source} is a {image.format} of mode {image.mode}, which JPEG cannot hold"
    image.resize((size, size), Image.Resampling.BICUBIC).save(draft, "JPEG")
    draft.rename(target)
    return ""


def _is_resized(Image: Any, path: Path, size: int) -> bool:
    """Whether a file is a JPEG of this size up to its end."""
    if not path.is_file():  # a FIFO would be waited for
        return False
    try:
        with path.open("rb") as file:
            file.seek(-len(_END_OF_JPEG), io.SEEK_END)
            whole = file.read() == _END_OF_JPEG
            file.seek(0)
            return whole and Image.open(file, formats=["JPEG"]).size == (size, size)
    except (OSError, Image.DecompressionBombError):  # empty, no JPEG: it is written anew
        return False
