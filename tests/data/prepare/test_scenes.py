"""The scenes of the tiny world: pictures, captions and how they are written."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sd_perf.data.images import load_image
from sd_perf.data.prepare import scenes
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.scenes import (
    BACKGROUND,
    COLOURS,
    DISTANCE,
    HALF_WIDTH,
    SIDESTEP,
    all_attributes,
    render,
    write_scenes,
)
from sd_perf.errors import DataError
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.stopping import Stopped


def test_a_scene_is_a_function_of_seed_and_index():
    scene, again = render(3, 17), render(3, 17)
    assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
    assert np.array_equal(scene.image, again.image) and scene.caption == again.caption
    assert not np.array_equal(scene.image, render(3, 18).image)
    assert not np.array_equal(scene.image, render(4, 17).image)


def test_scenes_are_the_same_on_every_machine():
    """Fixed numbers of one scene, so that a change of numpy or of the renderer shows."""
    scene = render(0, 0)
    assert scene.caption == "a red square above a green square"
    assert scene.image[0, 0].tolist() == [178] * 3
    assert int(scene.image.astype(np.int64).sum()) == 1_847_986


def test_every_caption_occurs_and_says_its_attributes():
    captions = [attributes.caption for attributes in all_attributes()]
    assert len(captions) == len(set(captions)) == 96
    seen = {render(1, index).caption for index in range(1500)}
    assert seen == set(captions)


def test_shapes_neither_touch_nor_leave_the_picture():
    assert DISTANCE[0] > HALF_WIDTH[1] + 1
    assert max(DISTANCE[1], SIDESTEP) + HALF_WIDTH[1] + 0.5 < 31.5
    for index in range(200):
        image = render(2, index).image.astype(int)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all() and BACKGROUND[0] - 1 <= border[0, 0] <= BACKGROUND[
            1
        ] + 1


def test_pictures_show_the_colours_of_their_captions():
    for index in range(50):
        scene = render(6, index)
        pixels = {tuple(pixel) for pixel in scene.image.reshape(-1, 3).tolist()}
        named = {scene.attributes.first_colour, scene.attributes.second_colour}
        assert {name for name, colour in COLOURS.items() if colour in pixels} == named


def test_written_scenes_are_read_as_photographs_are(tmp_path):
    pytest.importorskip("PIL", reason="needs Pillow")
    write_scenes(tmp_path / "scenes", 5, seed=7)
    images = read_images(tmp_path / "scenes")
    assert [image.captions for image in images] == [
        (render(7, index).caption,) for index in range(5)
    ]
    expected = torch.from_numpy(render(7, 4).image).permute(2, 0, 1) / 255
    assert torch.equal(load_image(images[4].path, 64), expected)
    assert torch.equal(load_image(images[4].path, 64, fit="squash"), expected)
    assert set(
        json.loads((tmp_path / "scenes" / "captions.jsonl").read_text().splitlines()[0])
    ) == {"file", "caption"}
    with pytest.raises(DataError, match="not empty"):
        write_scenes(tmp_path / "scenes", 5, seed=7)


def test_scenes_that_were_stopped_are_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="needs Pillow")

    def stop(*_):
        raise Stopped(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(scenes, "json", SimpleNamespace(dumps=stop))
        write_scenes(tmp_path / "scenes", 5, seed=7)
    assert not list((tmp_path / "scenes").iterdir())
    write_scenes(tmp_path / "scenes", 5, seed=7)


def test_captions_are_short():
    define_missing_torchvision_ops()
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    tokens = open_clip.SimpleTokenizer(context_length=24)(
        [attributes.caption for attributes in all_attributes()]
    )
    assert int((tokens != 0).sum(dim=1).max()) <= 12


def test_scenes_without_captions(tmp_path):
    pytest.importorskip("PIL", reason="needs Pillow")
    write_scenes(tmp_path, 4, seed=7, uncaptioned_every=2)
    images = read_images(tmp_path, allow_empty=True)
    assert [image.captions[0] for image in images] == [
        "",
        render(7, 1).caption,
        "",
        render(7, 3).caption,
    ]
    with pytest.raises(DataError, match=r"line 1 .*caption is empty"):
        read_images(tmp_path)
