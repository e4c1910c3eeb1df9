"""Grids of pictures as HTML: the newest one cut into its pictures, the earlier ones made small."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

from sd_perf.data.images import decode_image
from sd_perf.errors import UserError
from sd_perf.files import one_line, opened_untrusted
from sd_perf.tools.report.run_contents import PictureGrid

if TYPE_CHECKING:
    from PIL.Image import Image

# Sides in pixels that a picture and an earlier grid are reduced to: about twice their size on the
# page, for screens with two pixels per CSS pixel.
_PICTURE_SIDE, _GRID_WIDTH = 320, 420
# Shown at most. More would make the file heavy and tell no more.
_MAX_PICTURES, _MAX_GRIDS = 48, 12


def newest_grid(grid: PictureGrid) -> str:
    """Every picture of a grid with its prompt below; the whole grid where no prompts are known."""
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
    for i, prompt in enumerate(grid.prompts[:_MAX_PICTURES]):
        row, column = divmod(i, grid.columns)
        left, top = round(column * width), round(row * height)
        picture = image.crop((left, top, round((column + 1) * width), round((row + 1) * height)))
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        words = html.escape(prompt)
        figures.append(f"<figure>{_img(picture, prompt)}<figcaption>{words}</figcaption></figure>")
    more = len(grid.prompts) - len(figures)
    left_out = (
        f'<p class="quiet">{more} more pictures are in samples/{grid.path.name}.</p>'
        if more
        else ""
    )
    return f'<div class="grid">{"".join(figures)}</div>{left_out}'


def progress_strip(grids: list[PictureGrid]) -> str:
    """Small copies of grids with their positions: all, or twelve evenly spaced ones."""
    shown = grids
    if len(grids) > _MAX_GRIDS:
        between = (len(grids) - 1) / (_MAX_GRIDS - 1)
        shown = [grids[round(i * between)] for i in range(_MAX_GRIDS)]
    figures = []
    for grid in shown:
        image, caption = _open(grid), f"{grid.samples:,} samples"
        image.thumbnail((_GRID_WIDTH, 4 * _GRID_WIDTH))
        copy = _img(image, f"grid at {caption}")
        figures.append(f"<figure>{copy}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="strip">{"".join(figures)}</div>'


def _open(grid: PictureGrid) -> Image:
    try:
        with opened_untrusted(grid.path, "move it away") as file:
            return decode_image(file).convert("RGB")
    except ValueError as error:
        raise UserError(
            f"{grid.path}: cannot be read as a picture ({one_line(error)}); move it away"
        ) from error


def _img(image: Image, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    # The page enlarges a small picture; its pixels are then shown as squares, not blurred.
    kind = ' class="small-pixels"' if image.width <= 96 else ""
    return f'<img{kind} src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
