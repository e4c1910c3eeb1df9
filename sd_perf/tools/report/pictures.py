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
_MAX_PICTURES, _MAX_GRIDS, _MAX_ROWS = 48, 12, 8
# Side in pixels of a picture in the table through training.
_CELL_SIDE = 160


def newest_grid(grid: PictureGrid) -> str:
    """Every picture of a grid with its prompt below; the whole grid where no prompts are known."""
    image = _open(grid)
    if not grid.prompts:
        return (
            '<p class="quiet">No prompts beside this grid '
            f"({grid.path.stem}.json).</p>{_img(image, 'samples')}"
        )
    figures = []
    pictures = _pictures_of(grid, image)
    for prompt, picture in zip(grid.prompts[:_MAX_PICTURES], pictures, strict=False):
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


def through_training(grids: list[PictureGrid]) -> str:
    """A table of pictures: a row per prompt of the newest grid, a column per grid that has it.

    The pictures of a row are drawn from the same noise, since a prompt keeps its place. Rows are
    the first few prompts that an earlier grid has, too; empty where there are none.
    """
    *earlier, newest = grids
    old = {prompt for grid in earlier for prompt in grid.prompts}
    prompts = [prompt for prompt in dict.fromkeys(newest.prompts) if prompt in old][:_MAX_ROWS]
    if not prompts:
        return ""
    shown = _evenly([grid for grid in grids if not set(prompts).isdisjoint(grid.prompts)])
    columns = [_cut(grid) for grid in shown]
    heads = "".join(f"<th>{grid.samples:,}</th>" for grid in shown)
    rows = []
    for prompt in prompts:
        cells = "".join(
            f"<td>{_img(column[prompt], prompt) if prompt in column else ''}</td>"
            for column in columns
        )
        rows.append(f'<tr><th scope="row">{html.escape(prompt)}</th>{cells}</tr>')
    return f'<table class="through"><tr><th>samples</th>{heads}</tr>{"".join(rows)}</table>'


def _cut(grid: PictureGrid) -> dict[str, Image]:
    """The first picture of each prompt of a grid, small."""
    pictures = dict(zip(reversed(grid.prompts), reversed(_pictures_of(grid)), strict=True))
    for picture in pictures.values():
        picture.thumbnail((_CELL_SIDE, _CELL_SIDE))
    return pictures


def _evenly(grids: list[PictureGrid]) -> list[PictureGrid]:
    """All grids, or twelve evenly spaced ones, first and last among them."""
    if len(grids) <= _MAX_GRIDS:
        return grids
    between = (len(grids) - 1) / (_MAX_GRIDS - 1)
    return [grids[round(i * between)] for i in range(_MAX_GRIDS)]


def progress_strip(grids: list[PictureGrid]) -> str:
    """Small copies of grids with their positions: all, or twelve evenly spaced ones."""
    figures = []
    for grid in _evenly(grids):
        image, caption = _open(grid), f"{grid.samples:,} samples"
        image.thumbnail((_GRID_WIDTH, 4 * _GRID_WIDTH))
        copy = _img(image, f"grid at {caption}")
        figures.append(f"<figure>{copy}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="strip">{"".join(figures)}</div>'


def _pictures_of(grid: PictureGrid, image: Image | None = None) -> list[Image]:
    """The picture of each of a grid's prompts; `image` is the grid, where it is open already."""
    image = image or _open(grid)
    rows = math.ceil(len(grid.prompts) / grid.columns)
    width, height = image.width / grid.columns, image.height / max(rows, 1)
    if min(width, height) < 1:
        raise UserError(
            f"{grid.path}: is too small for {rows} rows of {grid.columns} pictures; draw it again"
        )
    pictures = []
    for i in range(len(grid.prompts)):
        row, column = divmod(i, grid.columns)
        left, top = round(column * width), round(row * height)
        box = (left, top, round((column + 1) * width), round((row + 1) * height))
        pictures.append(image.crop(box))
    return pictures


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
