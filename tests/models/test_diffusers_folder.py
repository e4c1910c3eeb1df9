"""Folders of diffusers: round trips, stock diffusers as the judge, foreign and damaged folders."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.ddim import ddim_sample
from sd_perf.errors import CheckpointError
from sd_perf.models.diffusers_folder import (
    WEIGHTS,
    export_diffusers,
    read_diffusers_unet,
    read_scheduler,
)
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.reference.unet import UNet
from tests.models.test_weight_files import MIXED, UNIFORM, build, same


@pytest.fixture(scope="module")
def diffusers():
    define_missing_torchvision_ops()
    return pytest.importorskip("diffusers")


@torch.no_grad()
def relative_error(theirs, ours: UNet) -> float:
    """Relative error of the output of diffusers' UNet against ours."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps, context = (
        torch.tensor([17, 981]),
        torch.randn(2, 5, ours.config.context_dim, generator=generator),
    )
    right = ours(latents, timesteps, context)
    return ((theirs(latents, timesteps, context).sample - right).norm() / right.norm()).item()


@pytest.mark.parametrize("config", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_export_diffusers_round_trip(tmp_path, config):
    state = build(config).to(memory_format=torch.channels_last).state_dict()
    export_diffusers(state, config, tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        read, read_config = read_diffusers_unet(folder)
        assert same(read, state)
        assert read_config == config


def test_uniform_groups_load_in_stock_diffusers(tmp_path, diffusers):
    unet = build(UNIFORM)
    export_diffusers(unet.state_dict(), UNIFORM, tmp_path, sample_size=8)
    assert not (tmp_path / "unet" / "load_unet.py").exists()
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert stock.config.sample_size == 8
    assert relative_error(stock, unet) < 1e-5


def test_mixed_groups_need_the_loader(tmp_path, diffusers):
    unet = build(MIXED)
    export_diffusers(unet.state_dict(), MIXED, tmp_path)
    with pytest.raises(ValueError, match=r"norms of two numbers of groups: .* load_unet\.py"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    # What the refusal saves from, and why the loader is needed:
    options = {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet", **options)
    assert relative_error(stock, unet) > 0.05
    spec = importlib.util.spec_from_file_location("load_unet", tmp_path / "unet" / "load_unet.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    assert relative_error(loader.load_unet(), unet) < 1e-5
    half = loader.load_unet(torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_a_pipeline_of_mixed_groups_stops(tmp_path, diffusers):
    export_diffusers(build(MIXED).state_dict(), MIXED, tmp_path)
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"load_unet\.py"):
        diffusers.DDIMPipeline.from_pretrained(tmp_path)


def test_folder_of_an_earlier_version(tmp_path):
    """It names the usual middle block."""
    export_diffusers(build(MIXED).state_dict(), MIXED, tmp_path)
    change_config(tmp_path, {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    assert read_diffusers_unet(tmp_path)[1] == MIXED


@pytest.mark.parametrize("diffusion", [DiffusionConfig(), DiffusionConfig(100, 0.001, 0.02)])
def test_the_schedulers_steps_are_ours(tmp_path, diffusers, diffusion):
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path, diffusion=diffusion)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(10)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(x, timestep, _):
        return torch.sin(3 * x + timestep.view(-1, 1, 1, 1) / 300)

    x, none = noise, torch.zeros(1, 1, 1)
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep, none), timestep, x).prev_sample
    ours = ddim_sample(predict, noise, none, none, diffusion, steps=10, guidance_scale=1.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_reads_what_stock_diffusers_writes(tmp_path, diffusers):
    unet = build(UNIFORM)
    export_diffusers(unet.state_dict(), UNIFORM, tmp_path / "ours")
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours" / "unet")
    stock.save_pretrained(tmp_path / "theirs")
    read, config = read_diffusers_unet(tmp_path / "theirs")
    assert same(read, unet.state_dict())
    assert config == UNIFORM


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ({"use_linear_projection": False}, "use_linear_projection"),
        ({"attention_head_dim": [2, 2]}, "attention_head_dim"),
        ({"block_out_channels": [64, 100]}, "config.json"),
        ({"norm_num_groups": 7}, "resblock_groups"),
        ({"layers_per_block": [2, 2]}, "config.json"),
    ],
)
def test_foreign_diffusers_config(tmp_path, change, complaint):
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(CheckpointError, match=complaint):
        read_diffusers_unet(tmp_path)


@pytest.mark.parametrize("value", [None, "x", 1.5, []], ids=repr)
def test_entries_of_other_types(value, tmp_path):
    """Any value for any entry is taken, or refused in a sentence."""
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path)
    refused = 0
    for file, read in (
        ("unet/config.json", read_diffusers_unet),
        ("scheduler/scheduler_config.json", read_scheduler),
    ):
        entries = json.loads((tmp_path / file).read_text())
        for key in entries:
            (tmp_path / file).write_text(json.dumps({**entries, key: value}))
            try:
                read(tmp_path)
            except CheckpointError:
                refused += 1
        (tmp_path / file).write_text(json.dumps(entries))
    assert refused > 5


def test_no_diffusers_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        read_diffusers_unet(tmp_path)


def change_config(folder, change):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("kind", ["parts", "bin", "parts of bin", "fp16", "fp16 and whole"])
def test_other_forms_of_the_weights(tmp_path, diffusers, kind):
    state = build(UNIFORM).state_dict()
    export_diffusers(state, UNIFORM, tmp_path)
    whole = tmp_path / "unet" / f"{WEIGHTS}.safetensors"
    options = {"safe_serialization": "bin" not in kind}
    if "parts" in kind:
        options["max_shard_size"] = "500KB"
    if "fp16" in kind:
        options["variant"] = "fp16"
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    if kind != "fp16 and whole":
        whole.unlink()
    stock.save_pretrained(tmp_path / "unet", **options)
    assert whole.exists() == (kind == "fp16 and whole")
    assert len(list(whole.parent.iterdir())) > (3 if "parts" in kind else 1)
    assert same(read_diffusers_unet(tmp_path)[0], state)


def test_parts_that_are_not_all_there(tmp_path):
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path)
    whole = tmp_path / "unet" / f"{WEIGHTS}.safetensors"
    index = whole.with_name(f"{whole.name}.index.json")
    whole.rename(whole.with_name("a.safetensors"))
    for content, complaint in (
        ({"weight_map": {"conv_in.weight": "../a.safetensors"}}, "no file beside it"),
        ({"weight_map": {"conv_in.weight": ""}}, "no file beside it"),
        ({"weight_map": {"conv_in.weight": 300 * "x"}}, "no file beside it"),
        ({"weight_map": {"conv_in.weight": "b.safetensors"}}, "there is no such file"),
        ({"weight_map": {"conv_in.weight": "a.safetensors"}}, "other weights than it names"),
        ({"weight_map": [1]}, "cannot be read as the index"),
        ({"weight_map": {"conv_in.weight": 3}}, "cannot be read as the index"),
        ([], "cannot be read as the index"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=complaint):
            read_diffusers_unet(tmp_path)


def test_variants_alone(tmp_path):
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path)
    whole = tmp_path / "unet" / f"{WEIGHTS}.safetensors"
    content = whole.read_bytes()
    whole.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_diffusers_unet(tmp_path)
    for variant in ("fp16", "non_ema"):
        whole.with_name(f"{WEIGHTS}.{variant}.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"several variants .*fp16.*non_ema"):
        read_diffusers_unet(tmp_path)
