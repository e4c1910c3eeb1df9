"""The committed files of the tiny world: small, readable, and as good as they claim."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.config import TextEncoderConfig
from sd_perf.data.prepare.scenes import all_attributes, render
from sd_perf.evaluation.feature_net import read_feature_net
from sd_perf.evaluation.judge import judge
from sd_perf.models.open_clip_library import VOCABULARY, read_clip
from sd_perf.models.readers import read_autoencoder, read_decoder, read_encoder
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.presets import load_preset

define_missing_torchvision_ops()
pytest.importorskip("open_clip", reason="needs open_clip")
ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets" / "tiny"
CLIP = TextEncoderConfig(str(ASSETS / "clip.json"), str(ASSETS / "clip.safetensors"))
CAPTIONS = [attributes.caption for attributes in all_attributes()]


@pytest.fixture(scope="module")
def scenes():
    return [render(200, index) for index in range(200)]


@pytest.fixture(scope="module")
def images(scenes) -> torch.Tensor:
    """(200, 3, 64, 64) float32 in [0, 1]"""
    return (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 255
    )


@pytest.fixture(scope="module")
def moments(images) -> torch.Tensor:
    return read_encoder(ASSETS / "autoencoder.safetensors")(images * 2 - 1)


@pytest.fixture(scope="module")
def encoder() -> OpenClipTextEncoder:
    return OpenClipTextEncoder(CLIP)


@pytest.fixture(scope="module")
def similarity(images) -> torch.Tensor:
    """Cosines of 200 pictures and 96 captions, by open_clip's own preprocessing and code."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    model, tokenizer = read_clip("clip", CLIP.model, Path(CLIP.weights))
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    pictures = model.encode_image((images - mean) / std, normalize=True)
    return pictures @ model.encode_text(tokenizer(CAPTIONS), normalize=True).T


def test_sizes():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 10e6


def test_the_autoencoder_keeps_what_captions_say(scenes, images, moments):
    decoded = read_decoder(ASSETS / "autoencoder.safetensors")(moments[:, :4])
    error = ((decoded.clamp(-1, 1) + 1) / 2 - images).square().mean(dim=(1, 2, 3))
    assert float((-10 * torch.log10(error)).mean()) > 33
    pictures = ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    accepted = [
        judge(picture, scene.caption) for picture, scene in zip(pictures, scenes, strict=True)
    ]
    assert np.mean(accepted) >= 0.97


def test_latents_of_the_preset_have_unit_variance(moments):
    assert read_autoencoder(ASSETS / "autoencoder.safetensors").config.downsampling == 8
    mean, log_variance = moments.chunk(2, dim=1)
    scale = load_preset(ROOT / "configs" / "smoke.yaml").diffusion.latent_scale
    noise = log_variance.exp().mean(dim=(0, 2, 3))
    variance = scale**2 * (mean.var(dim=(0, 2, 3)) + noise)
    assert ((variance > 0.9) & (variance < 1.1)).all()  # of every channel
    assert 1e-4 < float(scale * noise.min()) < 0.1  # a Gaussian, neither a point nor mostly noise


def test_text_states(encoder):
    states = encoder([*CAPTIONS, ""])
    assert states.shape == (97, 24, 128) and states.dtype == torch.float32
    distances = torch.cdist(states.flatten(1), states.flatten(1)) + torch.eye(97) * 1e6
    assert float(distances.min()) > 1
    assert encoder.width == load_preset(ROOT / "configs" / "smoke.yaml").model.context_dim


def test_words_without_a_row_mean_nothing_and_do_no_harm(encoder):
    states = encoder(["a purple elephant above a red circle", "a bright zebra above a red circle"])
    assert torch.isfinite(states).all()
    torch.testing.assert_close(states[0], states[1])
    known = (encoder.tower.token_embedding.weight.abs().sum(dim=1) > 0).sum()
    assert encoder.tower.token_embedding.weight.shape == (VOCABULARY, 128) and 10 < int(known) < 20


def test_clip_finds_captions(scenes, similarity):
    own = torch.tensor([CAPTIONS.index(scene.caption) for scene in scenes])
    assert float((similarity.argmax(dim=1) == own).float().mean()) > 0.9
    right, wrong = (
        similarity[torch.arange(len(own)), index].mean() for index in (own, own.roll(1))
    )
    assert right > wrong + 0.2


def test_frechet_distance_grows_with_blur_and_noise():
    distances = json.loads((ASSETS / "report.json").read_text())["frechet_distance_n_512"]
    for kind in ("blur", "noise"):
        row = [
            distances["unchanged"],
            *(value for name, value in distances.items() if name.startswith(kind)),
        ]
        assert len(row) == 4 and row == sorted(row)


def test_features_tell_scenes_apart_and_notice_blur_and_noise(images):
    net = read_feature_net(ASSETS / "features.safetensors")
    features = net(images)
    assert features.shape == (200, 64) and features.dtype == torch.float32
    spread = features.std(dim=0).norm()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    weak, strong = (
        (net((images + sigma * noise).clamp(0, 1)) - features).norm(dim=1).mean()
        for sigma in (0.05, 0.3)
    )
    assert 0 < weak < strong and spread > 0


def test_the_report_has_the_sizes_of_the_networks() -> None:
    report = json.loads((ASSETS / "report.json").read_text())
    assert report["bytes"] == {
        path.name: path.stat().st_size for path in ASSETS.glob("*.safetensors")
    }
