"""A small folder of photographs with a captions file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three pictures of one colour each, of different sizes, with two captions each."""
    Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number, (name, extent) in enumerate(
        [("a.png", (40, 30)), ("b.jpg", (30, 50)), ("c.png", (32, 32))]
    ):
        Image.new("RGB", extent, (50 * number, 100, 200)).save(folder / name)
        captions = [f"picture {number}", f"other words for {number}"]
        lines.append(
            json.dumps(
                {
                    "file": name,
                    "captions": captions,
                    "width": extent[0],
                    "flickr_url": "u",
                    "sha256": "x",
                }
            )
        )
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
