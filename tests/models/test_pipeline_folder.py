"""Whole pipelines: what real diffusers and transformers make of an exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd_perf.config import Config, TextEncoderConfig
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.errors import CheckpointError
from sd_perf.evaluation.generate import generate
from sd_perf.models.companions import Companions, Named, find_companions
from sd_perf.models.diffusers_folder import read_diffusers_unet, write_model
from sd_perf.models.pipeline_folder import export_pipeline
from sd_perf.models.readers import read_autoencoder, read_decoder
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.models.transformers_text import text_config, text_weights, write_tokenizer
from sd_perf.presets import config_from_dict
from tests.models.test_weight_files import build, same

ASSETS = Path(__file__).parents[2] / "assets" / "tiny"
NAMED = Named(
    str(ASSETS / "autoencoder.safetensors"),
    str(ASSETS / "clip.json"),
    str(ASSETS / "clip.safetensors"),
)
UNET = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 32,
    "context_dim": 128,
}
CAPTIONS = [
    "a red circle above a blue square",
    "",
    "Stop!  it's 10% off, l'été à Zürich... \U0001f600 !!",
    "word " * 100,
]


@pytest.fixture(scope="module")
def libraries():
    """Skips without transformers, which slow tests alone have: mark what asks for it so."""
    define_missing_torchvision_ops()
    reason = "needs transformers: pip install 'sd-perf[pipelines]'"
    return pytest.importorskip("transformers", reason=reason), pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def companions() -> Companions:
    return find_companions(NAMED, config_of().model)


def config_of(**model) -> Config:
    tree = {
        "model": {**UNET, **model},
        "diffusion": {"latent_scale": 0.9},
        "data": {"format": "synthetic", "latent_size": 8, "context_tokens": 24},
        "sampling": {"steps": 5, "guidance_scale": 2.0},
    }
    return config_from_dict(tree)


def export(folder: Path, companions: Companions, config: Config) -> torch.nn.Module:
    unet = build(config.model)
    size = config.data.latent_size
    export_pipeline(
        unet.state_dict(), companions, folder, config.model, config.diffusion, size, card="a card"
    )
    return unet


@pytest.fixture(scope="module", params=["uniform", "mixed"])
def exported(request, companions, tmp_path_factory):
    """Folder, UNet and config of a whole pipeline, of one and of two numbers of groups."""
    groups = {"uniform": 32, "mixed": 16}[request.param]
    config = config_of(resblock_groups=groups)
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    return folder, export(folder, companions, config), config


@pytest.fixture(scope="module")
def pipeline(exported, libraries):
    _, diffusers = libraries
    folder, _, config = exported
    mixed = config.model.resblock_groups != 32
    options = {"trust_remote_code": True} if mixed else {}
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, **options)


@pytest.mark.slow
def test_stock_diffusers_opens_it_whole(pipeline, exported):
    _, _, config = exported
    assert pipeline.safety_checker is None and not pipeline.config.requires_safety_checker
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae.config.scaling_factor == 0.9
    assert pipeline.text_encoder.config.num_hidden_layers == 2  # of three, without the last
    assert pipeline.unet.config.norm_num_groups == config.model.resblock_groups


@pytest.mark.slow
@torch.no_grad()
def test_it_draws_what_sample_draws(pipeline, exported, companions):
    """In float32 from the same noise, with guidance: equal up to the order of sums."""
    _, unet, config = exported
    prompts = CAPTIONS[:1] + CAPTIONS[2:]
    decode = read_decoder(Path(NAMED.autoencoder))
    [ours] = generate(unet, companions.text, decode, prompts, config=config, seed=3)
    noise = normal(3, Stream.SAMPLER, torch.arange(3), 4 * 8 * 8).view(3, 4, 8, 8)
    pipeline.set_progress_bar_config(disable=True)
    sampling = {"num_inference_steps": 5, "guidance_scale": 2.0}
    theirs = pipeline(prompts, latents=noise, output_type="pt", **sampling).images
    assert ours.std() > 0.05  # pictures, not one grey
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-5)


def test_it_is_read_back(exported, companions):
    folder, unet, config = exported
    state, model = read_diffusers_unet(folder)
    assert same(state, unet.state_dict()) and model == config.model
    vae = read_autoencoder(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae.config == companions.autoencoder.config
    assert same(vae.state_dict(), companions.autoencoder.state_dict())


@pytest.mark.slow
def test_tokens_are_ours(companions, libraries, tmp_path):
    transformers, _ = libraries
    write_tokenizer(companions.text, tmp_path / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, companions.text.tokenizer(CAPTIONS))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("weights", ["random", NAMED.text_weights], ids=["random", "trained"])
def test_states_are_ours(libraries, weights, tmp_path):
    transformers, _ = libraries
    encoder = OpenClipTextEncoder(TextEncoderConfig(NAMED.text_model, weights))
    write_model(tmp_path / "text", text_config(encoder), text_weights(encoder), name="model")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "text")
    states = theirs(encoder.tokenizer(CAPTIONS)).last_hidden_state
    torch.testing.assert_close(states, encoder(CAPTIONS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["layer scale", "no mask", "activation"])
def test_a_tower_of_another_form_is_refused(change, tmp_path):
    encoder = OpenClipTextEncoder(TextEncoderConfig(NAMED.text_model, "random"))
    block = encoder.tower.transformer.resblocks[0]
    if change == "layer scale":
        block.ls_1 = torch.nn.Linear(1, 1)
    elif change == "activation":
        block.mlp.gelu = torch.nn.ReLU()
    else:
        encoder.tower.attn_mask = None
    whole = Companions(read_autoencoder(Path(NAMED.autoencoder)), encoder)
    with pytest.raises(CheckpointError, match="a form that transformers' CLIPTextModel lacks"):
        export(tmp_path / "out", whole, config_of())
    assert not any((tmp_path / "out").iterdir())


def test_what_is_missing_leaves_no_index(companions, tmp_path):
    without_text = Companions(companions.autoencoder, None, ("the text encoder: nowhere",))
    export(tmp_path / "a", without_text, config_of())
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"unet", "scheduler", "vae", "README.md"}
    export(tmp_path / "b", Companions(missing=("all",)), config_of())
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"unet", "scheduler", "README.md"}


@pytest.mark.parametrize("name", ["unet", "vae", "tokenizer", "model_index.json", "README.md"])
def test_nothing_is_overwritten(name, companions, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name}: exists already"):
        export(tmp_path, companions, config_of())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
