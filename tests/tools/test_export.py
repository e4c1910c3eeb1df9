"""`sd-perf export` of runs and files: whole or with what is missing, dtypes, averages, the card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sd_perf.config import TextEncoderConfig
from sd_perf.fetch.manifest import File
from sd_perf.fetch.receipt import Receipt
from sd_perf.models.first_weights import read_first_weights
from sd_perf.models.readers import read_autoencoder, read_unet, told_diffusion
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.models.written_weights import export_ldm
from sd_perf.runs.folder import read_run_config
from sd_perf.tools.export import Wanted, export_weights
from tests.models.test_pipeline_folder import NAMED, UNET
from tests.models.test_weight_files import same
from tests.small_run import TREE, train_here

PARTS = {"unet", "scheduler", "vae", "text_encoder", "tokenizer", "model_index.json", "README.md"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps that names the tiny world's networks, keeps an average and has scores."""
    folder = tmp_path_factory.mktemp("export")
    changes = {
        "model": {**TREE["model"], **UNET, "attention_resolutions": [2]},
        "diffusion": {"latent_scale": 0.9},
        "training": {**TREE["training"], "max_samples": 8, "ema_decay": 0.9},
        "text_encoder": {"model": NAMED.text_model, "weights": NAMED.text_weights},
        "evaluation": {"autoencoder": NAMED.autoencoder},
    }
    (folder / "preset.yaml").write_text(yaml.safe_dump({**TREE, **changes}))
    train_here(folder / "preset.yaml", folder / "run")
    for name, fid in (("scores.jsonl", 40.5), ("scores_ema.jsonl", 30.25)):
        scores = [{"samples": n, "fid": fid, "clip": 0.1, "n": 256} for n in (8, 800)]
        (folder / "run" / name).write_text("".join(json.dumps(line) + "\n" for line in scores))
    return folder / "run"


@pytest.fixture
def nameless(run: Path, tmp_path: Path) -> Path:
    """The UNet of the run alone, in a file that tells its sizes."""
    export_weights(Wanted(run, tmp_path / "unet.safetensors"), lambda words: None)
    return tmp_path / "unet.safetensors"


def test_a_run_is_exported_whole(run: Path, tmp_path: Path, sd_perf) -> None:
    command = ("export", "--source", run, "--format", "diffusers", "--output", tmp_path / "a")
    code, output, _ = sd_perf(*command, "--dtype", "float16", "--ema")
    assert code == 0 and "no whole pipeline" not in output
    assert {path.name for path in (tmp_path / "a").iterdir()} == PARTS
    for weights in (tmp_path / "a").glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    average = {name: value.half() for name, value in read_unet(run, ema=True)[0].items()}
    assert same(read_unet(tmp_path / "a")[0], average)
    assert not same(average, {k: v.half() for k, v in read_unet(run)[0].items()})
    vae = json.loads((tmp_path / "a/vae/config.json").read_text())
    assert vae["scaling_factor"] == 0.9 and vae["sample_size"] == 64


@pytest.mark.parametrize(("format", "name"), [("diffusers", "folder"), ("ldm", "unet.safetensors")])
def test_another_run_begins_from_it(format, name, run: Path, tmp_path: Path, sd_perf) -> None:
    output = tmp_path / name
    assert sd_perf("export", "--source", run, "--format", format, "--output", output)[0] == 0
    config = read_run_config(run)
    config = replace(config, model=replace(config.model, init=str(output)))
    assert same(read_first_weights(config), read_unet(run)[0])


def test_the_card(run: Path, tmp_path: Path, sd_perf) -> None:
    sd_perf("export", "--source", run, "--format", "diffusers", "--output", tmp_path, "--ema")
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    for words in (
        "| weights | moving average, float32 |",
        "| trained on | 8 samples: 2 steps of 4 |",
        "| began from | random weights, seed 0 |",
        "| 8 | 30.25 | 0.100 | 256 |",
        "| stored as | synthetic |",
        "num_inference_steps=50, guidance_scale=8.0",
        "trust_remote_code=True",
        f"| autoencoder: {NAMED.autoencoder} | not known to sd-perf;",
    ):
        assert words in card, words
    assert "40.50" not in card and "| 800 |" not in card  # other weights; a later checkpoint
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["training"]["ema_decay"] == 0.9


def test_the_card_has_the_terms_of_what_was_fetched(run, tmp_path, sd_perf) -> None:
    fetched = tmp_path / "fetched" / "autoencoder.safetensors"
    fetched.parent.mkdir()
    shutil.copy(NAMED.autoencoder, fetched)
    Receipt(fetched.parent).add("stable-diffusion", File(fetched.name), None, "0" * 64)
    command = ("export", "--source", run, "--format", "diffusers", "--output", tmp_path / "a")
    assert sd_perf(*command, "--autoencoder", fetched)[0] == 0
    card = (tmp_path / "a/README.md").read_text()
    assert f"| autoencoder: {fetched} | CreativeML Open RAIL++-M" in card


def test_a_whole_ldm_file_and_the_way_back(run: Path, tmp_path: Path, sd_perf) -> None:
    full, again = tmp_path / "full.safetensors", tmp_path / "again"
    code, output, _ = sd_perf("export", "--source", run, "--full", "--output", full)
    assert code == 0 and "16 GroupNorm groups" in output and "--format diffusers" in output
    text = OpenClipTextEncoder(TextEncoderConfig(NAMED.text_model, str(full)))
    vae = read_autoencoder(full)
    assert same(vae.state_dict(), read_autoencoder(Path(NAMED.autoencoder)).state_dict())
    trained = OpenClipTextEncoder(TextEncoderConfig(NAMED.text_model, NAMED.text_weights))
    assert same(text.state_dict(), trained.state_dict())
    assert same(read_unet(full)[0], read_unet(run)[0])
    assert told_diffusion(full)["latent_scale"] == 0.9
    command = ("export", "--source", full, "--format", "diffusers", "--output", again)
    assert sd_perf(*command, "--text-model", NAMED.text_model)[0] == 0
    assert {path.name for path in again.iterdir()} == PARTS
    assert same(read_unet(again)[0], read_unet(run)[0])


def write_unet(run: Path, path: Path, **changes: int) -> Path:
    """The run's UNet in a file that tells its sizes, with changes, and not its prediction."""
    state, model = read_unet(run)
    export_ldm(state, path, {}, replace(model, **changes))
    return path


def test_of_32_groups_nothing_is_warned_of(run: Path, tmp_path: Path, sd_perf) -> None:
    source = write_unet(run, tmp_path / "a.safetensors", resblock_groups=32)
    command = ("export", "--source", source, "--output", tmp_path / "b")
    code, output, _ = sd_perf(*command)
    assert code == 0 and len(output.splitlines()) == 1


def test_what_is_missing_is_told(nameless: Path, tmp_path: Path, sd_perf) -> None:
    command = ("export", "--source", nameless, "--format", "diffusers", "--output", tmp_path / "a")
    code, output, _ = sd_perf(*command)
    assert code == 0 and "is no whole pipeline" in output
    for part, option in (("autoencoder", "--autoencoder"), ("text encoder", "--text-weights")):
        sentence = f"the {part}: none is named; give {option} FILE"
        assert sentence in output and sentence in (tmp_path / "a/README.md").read_text()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"unet", "scheduler", "README.md"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--format", "diffusers", "--full"), "--full: cannot be, for want of the autoencoder"),
        (("--full",), "--full: cannot be, for want of the autoencoder"),
        (("--format", "diffusers", "--autoencoder", "nowhere.ckpt"), "no such file"),
        (("--format", "diffusers", "--autoencoder", "a.onnx"), "is an ONNX file"),
        (("--text-weights", "a.bin"), "--text-weights: is for --full or --format diffusers"),
        (("--prediction", "epsilon"), "--prediction: epsilon cannot be used"),
    ],
)
def test_refused(options, sentence, nameless: Path, tmp_path: Path, refused) -> None:
    output = tmp_path / "output"
    assert sentence in refused("export", "--source", nameless, "--output", output, *options)
    assert not output.exists()


def test_networks_of_another_size_are_refused(nameless: Path, tmp_path: Path, refused) -> None:
    command = ("export", "--source", nameless, "--format", "diffusers", "--output", tmp_path / "a")
    wide = json.loads(Path(NAMED.text_model).read_text())
    wide["text_cfg"]["width"] = 64
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    options = ("--text-model", tmp_path / "wide.json", "--text-weights", "random")
    assert "its text states have 64 channels, and those of the UNet 128" in refused(
        *command, *options
    )


def test_a_file_that_does_not_tell_its_prediction(run: Path, tmp_path: Path, sd_perf) -> None:
    source = write_unet(run, tmp_path / "a.safetensors")
    command = ("export", "--source", source, "--output", tmp_path / "b")
    code, _, errors = sd_perf(*command, "--format", "diffusers")
    assert code == 2 and "add --prediction epsilon for stable-diffusion-2-base" in errors
    assert sd_perf(*command, "--format", "diffusers", "--prediction", "epsilon")[0] == 0
    assert told_diffusion(tmp_path / "b")["prediction"] == "epsilon"
