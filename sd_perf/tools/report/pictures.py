"""Sample grids as HTML: the newest cut into captioned pictures, the earlier ones as a strip of
small copies."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

from sd_perf.errors import UserError
from sd_perf.files import one_line
from sd_perf.tools.report.record import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL = 320  # pixels a captioned picture has at most, twice its size on the page
_COPY = 420  # and the width of an earlier grid
_CELLS, _COPIES = 48, 12  # more would make the file heavy and tell no more


def newest_grid(grid: Pictures) -> str:
    """Every picture of a grid over its prompt; the grid as it is where its prompts are not
    known."""
    image = _open(grid)
    if not grid.prompts:
        return (
            '<p class="quiet">No prompts beside this grid '
            f"({grid.path.stem}.json).</p>{_img(image, 'samples')}"
        )
    rows = math.ceil(len(grid.prompts) / grid.columns)
    width, height = image.width / grid.columns, image.height / rows
    if min(width, height) < 1:
        raise UserError(
            f"{grid.path}: is too small for {rows} rows of {grid.columns} pictures; draw it again"
        )
    figures = []
    for i, prompt in enumerate(grid.prompts[:_CELLS]):
        row, column = divmod(i, grid.columns)
        left, top = round(column * width), round(row * height)
        cell = image.crop((left, top, round((column + 1) * width), round((row + 1) * height)))
        cell.thumbnail((_CELL, _CELL))
        words = html.escape(prompt)
        figures.append(f"<figure>{_img(cell, prompt)}<figcaption>{words}</figcaption></figure>")
    more = len(grid.prompts) - len(figures)
    left_out = (
        f'<p class="quiet">{more} more pictures are in samples/{grid.path.name}.</p>'
        if more
        else ""
    )
    return f'<div class="grid">{"".join(figures)}</div>{left_out}'


def progress_strip(grids: list[Pictures]) -> str:
    """Small copies of grids with their positions: all of them, or twelve evenly apart."""
    shown = grids
    if len(grids) > _COPIES:
        shown = [grids[round(i * (len(grids) - 1) / (_COPIES - 1))] for i in range(_COPIES)]
    figures = []
    for grid in shown:
        image, caption = _open(grid), f"{grid.samples:,} samples"
        image.thumbnail((_COPY, 4 * _COPY))
        copy = _img(image, f"grid at {caption}")
        figures.append(f"<figure>{copy}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="strip">{"".join(figures)}</div>'


def _open(grid: Pictures) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(grid.path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{grid.path}: cannot be read as a picture ({one_line(error)}); move it away"
        ) from error


def _img(image: Image, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    kind = (
        ' class="small-pixels"' if image.width <= 96 else ""
    )  # enlarged by the page: show the pixels as they are
    return f'<img{kind} src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
