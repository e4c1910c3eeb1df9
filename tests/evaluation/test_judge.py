"""The judge: right captions, wrong captions, blur, and pictures that are no scene."""

import numpy as np
import pytest

from sd_perf.data.prepare.scenes import COLOURS, Attributes, Scene, all_attributes, coverage, render
from sd_perf.evaluation.judge import describe, judge


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(100, index) for index in range(1000)]


def paint(*shapes: tuple[str, str, float, float], grey: float = 200) -> np.ndarray:
    """A picture of shapes (colour, shape, x, y), each with a half width of 12 pixels."""
    image = np.full((64, 64, 3), grey)
    for colour, shape, x, y in shapes:
        cover = coverage(shape, x, y, 12)[..., None]
        image = image * (1 - cover) + np.array(COLOURS[colour]) * cover
    return image.astype(np.uint8)


def test_yes_to_true_captions(scenes):
    right = [judge(scene.image, scene.caption) for scene in scenes]
    assert np.mean(right) >= 0.99


def test_no_to_shuffled_captions(scenes):
    """Each picture with the caption of another; pairs with equal captions are not counted."""
    order = np.random.default_rng(0).permutation(len(scenes))
    pairs = [(scene, scenes[other]) for scene, other in zip(scenes, order, strict=True)]
    answers = [
        judge(scene.image, other.caption)
        for scene, other in pairs
        if scene.caption != other.caption
    ]
    assert len(answers) > 900
    assert np.mean(answers) <= 0.05


def test_no_to_every_other_caption(scenes):
    """Among them: one word changed, and the two objects exchanged."""
    for scene in scenes[:10]:
        yes = [
            attributes.caption
            for attributes in all_attributes()
            if judge(scene.image, attributes.caption)
        ]
        assert yes == [scene.caption]


def test_bytes_and_floats_are_judged_alike(scenes):
    assert all(judge(scene.image / 255, scene.caption) for scene in scenes[:50])
    assert all(
        judge((scene.image / 255).astype(np.float32), scene.caption) for scene in scenes[:50]
    )


def test_blur_is_forgiven(scenes):
    image_filter = pytest.importorskip("PIL.ImageFilter", reason="needs Pillow")
    image_module = pytest.importorskip("PIL.Image")
    for radius, share in ((1, 0.99), (2, 0.97)):
        blurred = [
            np.array(image_module.fromarray(s.image).filter(image_filter.GaussianBlur(radius)))
            for s in scenes[:100]
        ]
        assert (
            np.mean([judge(image, s.caption) for image, s in zip(blurred, scenes, strict=False)])
            >= share
        )


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_no_to_grey(level):
    assert describe(np.full((64, 64, 3), level)) is None


def test_no_to_noise():
    generator = np.random.default_rng(1)
    for scale in (0.1, 0.3, 1.0):
        noise = np.clip(0.5 + scale * generator.standard_normal((20, 64, 64, 3)), 0, 1)
        assert all(describe(image) is None for image in noise)
    blocks = generator.random((20, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    assert all(describe(image) is None for image in blocks)


RED, BLUE = ("red", "square", 16, 32), ("blue", "circle", 48, 32)


def test_what_a_picture_shows():
    assert describe(paint(RED, BLUE)) == Attributes("red", "square", "left of", "blue", "circle")
    assert describe(paint(("red", "circle", 30, 48), ("green", "circle", 34, 16))) == Attributes(
        "green", "circle", "above", "red", "circle"
    )


@pytest.mark.parametrize(
    "image",
    [
        paint(RED),
        paint(RED, ("red", "square", 48, 32)),
        paint(RED, BLUE, ("green", "circle", 32, 50)),
        paint(("red", "square", 26, 32), ("blue", "circle", 38, 32)),
        paint(("red", "square", 18, 18), ("blue", "circle", 46, 46)),
        paint(RED, ("blue", "square", 48, 20), ("blue", "square", 48, 44)),
    ],
    ids=[
        "one shape",
        "one colour",
        "three shapes",
        "overlapping",
        "diagonal",
        "two blobs of a colour",
    ],
)
def test_no_to_other_worlds(image):
    assert describe(image) is None


def test_no_to_captions_of_other_worlds(scenes):
    assert not judge(scenes[0].image, "a photo of a cat") and not judge(scenes[0].image, "")
