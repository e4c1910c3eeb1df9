"""What `read_unet` and `read_autoencoder` take, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_perf.cli import main
from sd_perf.config import UNetConfig
from sd_perf.errors import CheckpointError
from sd_perf.models import readers
from sd_perf.models.key_maps import to_diffusers
from sd_perf.models.readers import read_autoencoder, read_unet
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.models.written_weights import export_ldm
from tests.models.test_weight_files import MIXED, UNIFORM, build, same


@pytest.fixture
def small_default(monkeypatch):
    """The benchmark's network made small: readers take MIXED's sizes where a file names none."""

    def default(resblock_groups: int = 16) -> UNetConfig:
        return UNetConfig(**{**vars(MIXED), "resblock_groups": resblock_groups})

    monkeypatch.setattr(readers, "UNetConfig", default)


@pytest.mark.parametrize("groups", [16, 32])
@pytest.mark.parametrize("form", ["wrapped.ckpt", "bare.ckpt", "unet.bin", "a.safetensors"])
def test_groups_of_a_foreign_file_are_named(small_default, groups, form, tmp_path):
    state, path = build(MIXED).state_dict(), tmp_path / form
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(prefixed, path)
    else:
        content = {"wrapped.ckpt": {"state_dict": prefixed}, "bare.ckpt": prefixed}
        torch.save(content.get(form, state), path)
    with pytest.raises(CheckpointError, match=r"does not tell .* --groups 32 .* --groups 16"):
        read_unet(path)
    read, config = read_unet(path, groups)
    assert same(read, state) and config.resblock_groups == groups


@pytest.mark.parametrize("right", [MIXED, UNIFORM], ids=["16", "32"])
def test_an_exported_file_tells_its_groups(right, tmp_path):
    export_ldm(build(right).state_dict(), tmp_path / "a.safetensors", {}, right)
    assert read_unet(tmp_path / "a.safetensors")[1] == right
    assert read_unet(tmp_path / "a.safetensors", right.resblock_groups)[1] == right
    with pytest.raises(CheckpointError, match=r"--groups: .* cannot be used, since .* says"):
        read_unet(tmp_path / "a.safetensors", 48 - right.resblock_groups)


def test_groups_at_the_command_line(tmp_path, capsys):
    torch.save({"input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "a.ckpt")
    command = ["export", "--source", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "b")]
    for options, complaint in (
        ([], "--groups 32"),
        (["--groups", "16"], "not the weights of the UNet"),  # now only its shapes are wrong
    ):
        with pytest.raises(SystemExit) as left:
            main([*command, *options])
        assert left.value.code == 2
        assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["encoder.conv_in.weight"], "holds no UNet .* but the vae"),
        (["first_stage_model.quant_conv.bias"], "holds no UNet .* but the vae"),
        (["conv_in.weight"], "model of diffusers, whose folder"),
        (["a"], "other weights"),
    ],
)
def test_files_without_a_unet(names, complaint, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=complaint):
        read_unet(tmp_path / "a.ckpt", 16)


@pytest.mark.parametrize("form", ["checkpoint", "alone", "training", "diffusers"])
def test_forms_of_the_autoencoder(form, tmp_path, monkeypatch):
    small = AutoencoderConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    torch.manual_seed(0)
    state = AutoencoderKL(small).state_dict()
    monkeypatch.setattr(readers, "AutoencoderConfig", lambda: small)
    monkeypatch.setattr(readers, "AutoencoderKL", lambda config: AutoencoderKL(config or small))
    content = {
        "checkpoint": {f"first_stage_model.{name}": value for name, value in state.items()},
        "alone": state,
        "training": {**state, "loss.logvar": torch.zeros(1)},
        "diffusers": to_diffusers(state, small),
    }[form]
    torch.save({"state_dict": content}, tmp_path / "vae.ckpt")
    assert same(read_autoencoder(tmp_path / "vae.ckpt").state_dict(), state)


def test_no_autoencoder(tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        read_autoencoder(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"channels": 65_536}, "not the weights of the autoencoder"),  # 150 GB in a convolution
        ({"channels": 32, "channel_mult": [2048] * 16}, "not the weights of the autoencoder"),
        ({"channels": 8, "groups": 3}, "its sizes are not those of the autoencoder"),
    ],
)
def test_sizes_in_metadata_take_no_memory(sizes, sentence, tmp_path):
    weights = {"encoder.conv_in.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "a.safetensors", {"config": json.dumps(sizes)})
    with pytest.raises(CheckpointError, match=sentence):
        read_autoencoder(tmp_path / "a.safetensors")
