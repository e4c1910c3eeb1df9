"""COCO's validation set against pandas and Pillow, as the benchmark's script calls them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from sd_perf.data.coco import Caption, _is_resized, read_coco_captions, split, split_and_resize, tsv
from sd_perf.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def with_pandas(file: Path, num_samples: int) -> str:
    """The table of prompts, step by step as the benchmark's README describes it."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(json.loads(file.read_text())["annotations"])
    table["caption"] = [caption.replace("\n", "").strip() for caption in table["caption"]]
    table = table.sample(frac=1, random_state=2023).reset_index(drop=True)
    table = table.drop_duplicates(subset=["image_id"], keep="first")[:num_samples]
    return table.sort_values(by=["id"]).to_csv(sep="\t", index=False)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six pictures of COCO's names, one of them grey, and three captions of each."""
    images = tmp_path / "val2014"
    images.mkdir()
    captions = []
    for number in range(6):
        mode = "L" if number == 3 else "RGB"
        picture = Image.radial_gradient("L").resize((40 + 9 * number, 30)).convert(mode)
        picture.save(images / f"COCO_val2014_{70 + number:012}.jpg")
        for caption in (f'number\t{number} "quoted"', f" line\nbreak {number} \n", f"é {number}"):
            captions.append(
                {"image_id": 70 + number, "id": 900 - len(captions), "caption": caption}
            )
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "annotations": captions}))
    return tmp_path


def run(coco: Path, **options) -> None:
    split_and_resize(
        coco / "val2014", coco / "captions.json", coco / "out", coco / "out.tsv", size=16, **options
    )


def test_the_table_is_the_one_of_pandas(coco):
    file = coco / "captions.json"
    for num_samples in (1, 4, 6):
        expected = with_pandas(file, num_samples)
        assert tsv(split(read_coco_captions(file), num_samples)) == expected
        assert expected.startswith("image_id\tid\tcaption\n")


def test_the_table_of_real_captions_is_the_one_of_pandas(real_data):
    file = real_data / "coco_captions" / "captions_val2017.json"
    assert tsv(split(read_coco_captions(file), 3000)) == with_pandas(file, 3000)


def test_pictures_are_those_of_pillow(coco):
    run(coco, num_samples=5)
    assert (coco / "out.tsv").read_text() == with_pandas(coco / "captions.json", 5)
    written = sorted((coco / "out").iterdir())
    assert len(written) == 5
    for path in written:
        expected = io.BytesIO()
        with Image.open(coco / "val2014" / path.name) as picture:
            picture.resize((16, 16), Image.Resampling.BICUBIC).save(expected, "JPEG")
        assert path.read_bytes() == expected.getvalue()


def test_a_stopped_run_goes_on(coco):
    run(coco, num_samples=6)
    whole = {path.name: path.read_bytes() for path in (coco / "out").iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in (coco / "out").iterdir()}
    cut, gone, other_size, *kept = sorted(whole)
    (coco / "out" / cut).write_bytes(whole[cut][:-2])
    (coco / "out" / gone).unlink()
    Image.new("RGB", (20, 20)).save(coco / "out" / other_size)
    run(coco, num_samples=6)
    assert {path.name: path.read_bytes() for path in (coco / "out").iterdir()} == whole
    assert all((coco / "out" / name).stat().st_mtime_ns == times[name] for name in kept)


def test_bad_pictures_are_all_named_and_there_is_no_table(coco):
    names = [f"COCO_val2014_{70 + number:012}.jpg" for number in range(6)]
    (coco / "val2014" / names[0]).unlink()
    (coco / "val2014" / names[1]).write_bytes(b"no picture")
    Image.new("RGBA", (30, 30)).save(coco / "val2014" / names[2], "PNG")
    with pytest.raises(DataError, match=r"^3 of 6 pictures .* is not written") as info:
        run(coco, num_samples=6)
    assert all(name in str(info.value) for name in names[:3])
    assert sorted(path.name for path in coco.iterdir()) == ["captions.json", "out", "val2014"]
    assert sorted(path.name for path in (coco / "out").iterdir()) == names[3:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is no file of COCO captions"),
        (b'{"annotations": [{"id": 1, "caption": "x"}]}', r"annotations\[0\] lacks 'image_id'"),
        (b'{"annotations": [{"id": 1, "image_id": "../x", "caption": "x"}]}', "not a whole number"),
        (
            b'{"annotations": [{"id": 1, "image_id": 1, "caption": "x"}, '
            b'{"id": 1, "image_id": 2, "caption": "x"}]}',
            "two captions have the same id",
        ),
        (b'{"annotations": [' + 1_000_000 * b"{}," + b"{}]}", "has more than 1,000,000 objects"),
    ],
)
def test_captions_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_coco_captions(path)


def test_more_pictures_than_there_are():
    captions = [Caption(image_id=number // 2, id=number, caption="x") for number in range(8)]
    assert len(split(captions, 4)) == 4
    with pytest.raises(DataError, match=r"--num-samples: 5 .* of 4 pictures"):
        split(captions, 5)


def test_a_target_that_is_no_picture(tmp_path):
    """A FIFO is not waited for, and a header of billions of pixels is not a finished picture."""
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path)
    whole = path.read_bytes()
    size = whole.index(b"\xff\xc0") + 5
    path.write_bytes(whole[:size] + b"\xff\xd0\xff\xd0" + whole[size + 4 :])
    assert not _is_resized(Image, path, 8)
    path.unlink()
    os.mkfifo(path)
    assert not _is_resized(Image, path, 8)
