"""`model.init`: every source that training may begin from, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_perf.cli import main
from sd_perf.config import Config, DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError, ConfigError, UserError
from sd_perf.mlperf.rules import violations
from sd_perf.models.diffusers_folder import export_diffusers
from sd_perf.models.first_weights import first_weights_record, read_first_weights
from sd_perf.models.readers import read_diffusion
from sd_perf.models.weight_files import EMA_PREFIX, UNET_PREFIX
from sd_perf.models.written_weights import export_ldm, in_dtype
from sd_perf.reference.unet import UNet
from sd_perf.training.callbacks.checkpointer import Checkpointer
from tests.models.test_weight_files import MIXED, UNIFORM, build, same
from tests.small_run import small_config


def config_of(source: Path, model: UNetConfig = UNIFORM, prediction="v", **more) -> Config:
    model = replace(model, init=str(source), **more)
    return replace(Config(), model=model, diffusion=DiffusionConfig(prediction=prediction))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build(UNIFORM).state_dict()


@pytest.fixture
def pipeline(state, tmp_path) -> Path:
    """A folder as diffusers writes it, of a network that predicts the noise."""
    diffusion = DiffusionConfig(prediction="epsilon")
    export_diffusers(state, UNIFORM, tmp_path / "pipeline", diffusion=diffusion)
    return tmp_path / "pipeline"


def test_ldm_files_of_untold_groups(state, tmp_path):
    """Groups and prediction are the config's word where a file cannot tell."""
    halves = {UNET_PREFIX + name: value.half() for name, value in state.items()}
    torch.save({"state_dict": {**halves, "betas": torch.ones(3)}}, tmp_path / "a.ckpt")
    save_file(halves, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        for model in (MIXED, UNIFORM):
            read = read_first_weights(config_of(tmp_path / name, model, "epsilon"))
            assert same(read, {name: value.half() for name, value in state.items()})


def test_averaged_weights_of_an_ldm_file(state, tmp_path):
    content = {UNET_PREFIX + name: value for name, value in state.items()}
    torch.save(content, tmp_path / "without.ckpt")
    averaged = {EMA_PREFIX + name.replace(".", ""): 2 * value for name, value in state.items()}
    torch.save({**content, **averaged, "model_ema.decay": torch.ones(())}, tmp_path / "a.ckpt")
    read = read_first_weights(config_of(tmp_path / "a.ckpt", init_ema=True))
    assert same(read, {name: 2 * value for name, value in state.items()})
    assert same(read_first_weights(config_of(tmp_path / "a.ckpt")), state)
    with pytest.raises(CheckpointError, match=r"holds no averaged weights .*model\.init_ema false"):
        read_first_weights(config_of(tmp_path / "without.ckpt", init_ema=True))


def test_diffusers_folders_tell_prediction_and_groups(state, pipeline):
    for folder in (pipeline, pipeline / "unet"):
        assert same(read_first_weights(config_of(folder, prediction="epsilon")), state)
        with pytest.raises(ConfigError, match=r"^diffusion\.prediction: 'v' .* with 'epsilon' \("):
            read_first_weights(config_of(folder))
    with pytest.raises(ConfigError, match=r"^model\.resblock_groups: 16 .* trained with 32 \("):
        read_first_weights(config_of(pipeline, MIXED, "epsilon"))
    wide = replace(UNIFORM, channel_mult=(1, 1))
    with pytest.raises(ConfigError, match=r"^model\.channel_mult: \[1, 1\] .* with \[1, 2\] \("):
        read_first_weights(config_of(pipeline, wide, "epsilon"))
    with pytest.raises(CheckpointError, match=r"unet_ema: no such folder of a UNet"):
        read_first_weights(config_of(pipeline, prediction="epsilon", init_ema=True))
    (pipeline / "unet").rename(pipeline / "unet_ema")
    export_diffusers(state, UNIFORM, pipeline / "other")
    (pipeline / "other" / "unet").rename(pipeline / "unet")
    right = config_of(pipeline, prediction="epsilon", init_ema=True)
    assert same(read_first_weights(right), state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"beta_end": 0.02}, r"diffusion\.beta_end: 0\.012 .* with 0\.02"),
        ({"num_train_timesteps": 100}, r"diffusion\.num_timesteps: 1000 .* with 100"),
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"beta_end": "x"}, "beta_end is 'x', not a whole number or a number"),
        ({"prediction_type": None}, "prediction_type is None"),
    ],
)
def test_schedulers_of_another_diffusion(pipeline, change, complaint):
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=complaint):
        read_first_weights(config_of(pipeline, prediction="epsilon"))


def test_zero_terminal_snr_can_be_begun_and_is_then_kept(state, tmp_path):
    zero = DiffusionConfig(zero_terminal_snr=True, offset_noise=0.1)
    export_diffusers(state, UNIFORM, tmp_path / "without")
    export_diffusers(state, UNIFORM, tmp_path / "with", diffusion=zero)
    begun = replace(config_of(tmp_path / "without"), diffusion=zero)
    assert same(read_first_weights(begun), state)
    assert read_diffusion(tmp_path / "with") == replace(zero, offset_noise=0.0)
    with pytest.raises(ConfigError, match=r"diffusion\.zero_terminal_snr: False .* with True"):
        read_first_weights(config_of(tmp_path / "with"))


def test_names_and_shapes_that_differ_are_told(state, tmp_path):
    changed = {**state, "out.2.bias": torch.zeros(3), "more": torch.zeros(1)}
    del changed["out.0.bias"]
    torch.save({UNET_PREFIX + name: value for name, value in changed.items()}, tmp_path / "a.ckpt")
    said = r"1 missing \(.*out\.0\.bias\), 1 unexpected \(.*more\), 1 of another shape \(.*out\.2"
    with pytest.raises(CheckpointError, match=said):
        read_first_weights(config_of(tmp_path / "a.ckpt"))


def test_an_exported_file_tells_its_prediction(state, tmp_path):
    path = tmp_path / "a.safetensors"
    export_ldm(state, path, {}, UNIFORM, DiffusionConfig(prediction="epsilon"))
    assert same(read_first_weights(config_of(path, prediction="epsilon")), state)
    with pytest.raises(ConfigError, match=r"diffusion\.prediction: 'v'"):
        read_first_weights(config_of(path))
    record = first_weights_record(config_of(path))
    assert record["init"] == str(path) and list(record["sha256"]) == [str(path)]


@pytest.mark.parametrize("implementation", [pytest.param("plain", marks=pytest.mark.slow), "fast"])
def test_a_run_begins_from_another_and_resumes_without_it(
    make_config,
    make_trainer,
    implementation,
):
    first = make_config("first", training={"max_samples": 8})
    trainer = make_trainer(first, [Checkpointer()])
    trainer.fit()
    weights = {name: value.clone() for name, value in trainer.unet.state_dict().items()}
    model = {"init": first.run.dir, "implementation": implementation}
    second = make_config("second", model=model, training={"max_samples": 8, "seed": 5})
    trainer = make_trainer(second, [Checkpointer()])
    state = trainer.step.state()
    for name, value in weights.items():
        assert torch.equal(state[f"model.{name}"], value)
        assert not state[f"exp_avg.{name}"].any()
    trainer.fit()
    ended = {name: value.clone() for name, value in trainer.step.state().items()}
    Path(first.run.dir).rename(f"{first.run.dir}.moved")
    longer = replace(second, training=replace(second.training, max_samples=16))
    again = make_trainer(longer, resume=True).step.state()
    assert all(torch.equal(again[name], value) for name, value in ended.items())
    other = make_config("third", model={"init": second.run.dir, "init_ema": True})
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        make_trainer(other)


@pytest.mark.slow
def test_the_command_says_where_it_begins(tmp_path, preset, capsys):
    def said(*options: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["train", "--config", str(preset), "--run.dir", str(tmp_path / "run"), *options])
        captured = capsys.readouterr()
        return f"{left.value.code} {' '.join((captured.out + captured.err).split())}"

    absent = ("--model.init", str(tmp_path / "absent.ckpt"))
    refusal = said(*absent)
    assert "absent.ckpt: there is no such file" in refusal and refusal[0] == "2"
    assert not (tmp_path / "run").exists()
    for option in ("--dry-run", "--explain"):
        assert "(not there yet)" in said(option, *absent)
    small = small_config(tmp_path).model
    torch.save(UNet(small).state_dict(), tmp_path / "a.ckpt")
    began = said("--model.init", str(tmp_path / "a.ckpt"), "--training.max-samples", "4")
    assert f"begins from {tmp_path}/a.ckpt" in began and began[0] == "0"
    record = json.loads((tmp_path / "run" / "init.json").read_text())
    assert list(record["sha256"]) == [str(tmp_path / "a.ckpt")]
    torch.save({"input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "a.ckpt")
    refusal = said("--model.init", str(tmp_path / "a.ckpt"), "--dry-run")
    assert refusal[0] == "2" and "missing" in refusal


def test_exported_in_another_dtype_it_is_still_of_its_run(state, tmp_path, pipeline):
    for form, name in (("ldm", "a.safetensors"), ("diffusers", "folder")):
        command = ["export", "--source", str(pipeline), "--format", form, "--dtype", "float16"]
        with pytest.raises(SystemExit) as left:
            main([*command, "--output", str(tmp_path / name)])
        assert left.value.code == 0
        read = read_first_weights(config_of(tmp_path / name, prediction="epsilon"))
        assert same(read, {name: value.half() for name, value in state.items()})
    with pytest.raises(CheckpointError, match=r"x has values beyond the range of float16"):
        in_dtype({"x": torch.tensor(1e6)}, "float16", tmp_path)


def test_closed_division_begins_from_random_weights():
    config = replace(Config(), model=UNetConfig(init="a.ckpt", init_ema=True))
    rules = {key: rule for key, _, _, rule in violations(config)}
    for key in ("model.init", "model.init_ema"):
        assert rules[key] == "training begins from random weights"
