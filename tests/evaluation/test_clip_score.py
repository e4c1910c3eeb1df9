"""CLIP score against a computation by hand and against open_clip's own code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops

define_missing_torchvision_ops()
open_clip = pytest.importorskip("open_clip")

CAPTIONS = [
    "a red block left of a blue block",
    "",
    "Two GREEN circles &amp; a dog " + "far away " * 40,
]
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, Path]:
    """A model JSON and a file of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    config, weights = folder / "clip_score_test.json", folder / "weights.pt"
    config.write_text(json.dumps(MODEL))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.model.CLIP(**MODEL).state_dict(), weights)
    return str(config), weights


@pytest.fixture(scope="module")
def scorer(files) -> ClipScorer:
    return ClipScorer(*files)


def pictures() -> torch.Tensor:
    """Three wide pictures, of which a centre crop sees the middle 80 columns."""
    return torch.rand(3, 3, 80, 110, generator=torch.Generator().manual_seed(0))


def by_hand(weights: Path, images: torch.Tensor) -> torch.Tensor:
    """The benchmark's definition by Pillow, numpy and the two towers.

    Truncate, resize the shorter side to 64, centre crop, normalise, dot product.
    """
    model = open_clip.model.CLIP(**MODEL).eval()
    model.load_state_dict(torch.load(weights))
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    cosines = []
    for image, caption in zip(images, CAPTIONS, strict=True):
        picture = Image.fromarray(
            np.floor(image.permute(1, 2, 0).numpy() * np.float32(255)).astype(np.uint8)
        )
        picture = picture.resize((88, 64), Image.Resampling.BICUBIC).crop((12, 0, 76, 64))
        pixels = (np.asarray(picture, dtype=np.float32) / 255 - mean) / std
        with torch.no_grad():
            seen = model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            read = model.encode_text(open_clip.SimpleTokenizer(context_length=20)(caption))
        cosines.append((seen @ read.T / seen.norm() / read.norm()).item())
    return torch.tensor(cosines)


def test_cosines_by_hand(scorer, files):
    cosines = scorer.similarities(pictures(), CAPTIONS)
    assert cosines.dtype == torch.float32 and cosines.min() < 0  # random towers: a clamp would show
    torch.testing.assert_close(cosines, by_hand(files[1], pictures()), rtol=0, atol=1e-6)


def test_cosines_are_open_clips(scorer, files):
    """Compared with open_clip's own preprocessing and towers, on the truncated pictures."""
    model, _, prepare = open_clip.create_model_and_transforms("clip_score_test", str(files[1]))
    model.eval()
    truncated = [
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in pictures()
    ]
    with torch.no_grad():
        seen = model.encode_image(
            torch.stack([prepare(picture) for picture in truncated]), normalize=True
        )
        read = model.encode_text(
            open_clip.get_tokenizer("clip_score_test")(CAPTIONS), normalize=True
        )
    torch.testing.assert_close(
        scorer.similarities(pictures(), CAPTIONS), (seen * read).sum(1), rtol=0, atol=1e-6
    )


def test_batches_do_not_matter(scorer):
    cosines = scorer.similarities(pictures(), CAPTIONS)
    parts = [scorer.similarities(pictures()[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), cosines, rtol=0, atol=1e-6)
    assert not torch.allclose(scorer.similarities(pictures(), CAPTIONS[::-1]), cosines, atol=1e-4)


def test_model_of_the_benchmark_is_known():
    """open_clip has ViT-H-14 with 224-pixel pictures, and resizes as the benchmark does."""
    config = open_clip.get_model_config("ViT-H-14")
    assert config["vision_cfg"]["image_size"] == 224 and config["embed_dim"] == 1024
    default = open_clip.transform.PreprocessCfg()
    assert (default.interpolation, default.resize_mode) == ("bicubic", "shortest")


def test_bad_input(scorer, files, tmp_path):
    with pytest.raises(ValueError, match="3 images cannot be scored against 2 captions"):
        scorer.similarities(pictures(), CAPTIONS[:2])
    for value in (1.01, -0.01, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            scorer.similarities(torch.full((1, 3, 64, 64), value), CAPTIONS[:1])
    with pytest.raises(ConfigError, match="no model of open_clip"):
        ClipScorer("ViT-Nothing", files[1])
    with pytest.raises(ConfigError, match="no such file"):
        ClipScorer(str(tmp_path / "absent.json"), files[1])
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        ClipScorer(str(tmp_path / "damaged.json"), files[1])
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        ClipScorer(files[0], tmp_path / "absent.pt")
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="not a file of open_clip weights"):
        ClipScorer(files[0], tmp_path / "damaged.pt")
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="CLIP"):
        ClipScorer(files[0], tmp_path / "other.pt")
