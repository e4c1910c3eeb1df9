"""Dropped captions, flips and crops: drawn by position, the same for any split of the batch."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from sd_perf.config import Config, DataConfig
from sd_perf.data.augmentation import CaptionDropout, draw_views, is_dropped
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.images import load_picture
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.resize import View, resize_and_crop
from sd_perf.errors import ConfigError
from tests.data.test_raw_samples import config_of, picture, write

SEED = 7
EMPTY = torch.full((3, 5), 99.0)
PIXELS = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.manual_seed(0))


def loader(config: DataConfig, world: int = 1, rank: int = 0) -> PortableLoader:
    options = LoaderOptions(SEED, 6, 6 // world, rank, world, context_dim=5)
    return PortableLoader(config, options)


def test_share_of_dropped_captions():
    dropped = is_dropped(SEED, torch.arange(100_000), 0.1)
    assert abs(dropped.double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 100_000) ** 0.5
    assert not is_dropped(SEED, torch.arange(1000), 0.0).any()
    assert is_dropped(SEED, torch.arange(1000), 1.0).all()


@pytest.mark.parametrize(("world", "begin"), [(1, 0), (2, 0), (3, 12)])
def test_dropped_captions_do_not_depend_on_the_split(world, begin, make_shards):
    config, seen = make_shards(10), 0
    for rank in range(world):
        within = loader(config, world, rank)
        dropout = CaptionDropout(within, SEED, 0.4, EMPTY)
        assert dropout.fingerprint == within.fingerprint
        batches = dropout.batches(begin)
        for batch in islice(batches, 3):
            dropped = is_dropped(SEED, batch.sample_indices, 0.4).tolist()
            assert batch.captions == [
                "" if is_empty else f"caption {sample:.0f}"
                for is_empty, sample in zip(dropped, batch.moments[:, 0, 0, 0], strict=True)
            ]
            right = torch.where(torch.tensor(dropped), 99.0, -batch.moments[:, 0, 0, 0])
            assert (batch.context == right[:, None, None]).all()
            seen += sum(dropped)
        batches.close()
    assert seen == is_dropped(SEED, torch.arange(begin, begin + 18), 0.4).sum() > 0


def test_a_flip_exchanges_left_and_right():
    plain, flipped = (resize_and_crop(PIXELS.numpy(), 16, View(flip)) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


@pytest.mark.parametrize("size", [16, 24], ids=["resized", "as it is"])
@pytest.mark.parametrize("axis", [0, 1])
def test_crops_are_parts_of_the_whole_resized_picture(size, axis):
    pixels = np.ascontiguousarray(PIXELS.transpose(0, 1) if axis == 0 else PIXELS)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255,
        [length * size // 24 for length in pixels.shape[:2]],
        mode="bicubic",
        antialias=True,
    )[0]
    surplus = 40 * size // 24 - size
    for begin, place in ((0, 0.0), (surplus // 2, 0.5), (surplus, 1 - 2**-32)):
        square = resize_and_crop(pixels, size, View(crop=place))
        right = resized.narrow(1 + axis, begin, size)
        torch.testing.assert_close(square, right, rtol=0, atol=1e-5)


def test_views_are_drawn_by_position():
    positions = np.arange(400)
    views = draw_views(SEED, positions, flip=True, crop=True)
    assert views[7::3] == draw_views(SEED, positions[7::3], flip=True, crop=True)
    flips, crops = (np.array(each) for each in zip(*map(dataclasses.astuple, views), strict=True))
    assert 150 < flips.sum() < 250 and abs(crops.mean() - 0.5) < 0.08
    assert 0 <= crops.min() < 0.05 and 0.95 < crops.max() < 1
    flipped = draw_views(SEED, positions, flip=True, crop=False)
    assert flipped == [View(flip=bool(flip)) for flip in flips]
    assert draw_views(SEED, positions[:2], flip=False, crop=False) == [View(), View()]


def test_a_raw_loader_sees_its_pictures_so(tmp_path):
    content = picture(0, size=(20, 30))
    folder = write(tmp_path, *[content] * 6, extension="png")
    config = config_of(folder, random_flip=True, random_crop=True, image_range="benchmark")
    positions = np.arange(6, 12)
    pixels = loader(config).make(positions).pixels
    views = draw_views(SEED, positions, flip=True, crop=True)
    for view, seen in zip(views, pixels, strict=True):
        assert torch.equal(seen, load_picture(content, 16, "benchmark", view=view))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "synthetic", "drop_captions": 0.1}, "drop_captions.*have no captions"),
        ({"path": "a", "drop_captions": 1.5}, "drop_captions: 1.5 .*between 0 and 1"),
        ({"path": "a", "random_flip": True}, "random_flip.*data.format is 'moments'"),
    ],
)
def test_what_cannot_be_changed_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**fields)


def test_states_of_the_empty_caption_must_be_at_hand():
    data = DataConfig(path="a", context="precomputed", drop_captions=0.1)
    with pytest.raises(ConfigError, match=r"data\.drop_captions: 0\.1 .*text_encoder\.weights"):
        Config(data=data)
