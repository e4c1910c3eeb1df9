"""Weight files: hostile and damaged pickles, strict loading, both exports."""

import collections
import os
import sys
import types

import numpy as np
import pytest
import torch

from sd_perf.config import UNetConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.models import diffusers_folder, written_weights
from sd_perf.models.diffusers_folder import export_diffusers
from sd_perf.models.vae import AutoencoderConfig
from sd_perf.models.weight_files import (
    load_into,
    read_ldm_checkpoint,
    safetensors_config,
    split_components,
)
from sd_perf.models.written_weights import export_ldm
from sd_perf.reference.unet import UNet

MIXED = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    attention_resolutions=(2, 1),
    num_head_channels=32,
    context_dim=24,
)
UNIFORM = UNetConfig(**{**vars(MIXED), "resblock_groups": 32})
STATE = {"model.diffusion_model.out.2.bias": torch.arange(4.0)}


def build(config: UNetConfig) -> UNet:
    """A seeded UNet with no layer at 0, so that the output is not 0."""
    torch.manual_seed(0)
    unet = UNet(config)
    for layer in unet.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.reset_parameters()
    return unet


def same(state, right) -> bool:
    return state.keys() == right.keys() and all(
        torch.equal(state[name], right[name]) for name in right
    )


def pretend_lightning(monkeypatch, package: str) -> type:
    """An importable ModelCheckpoint under Lightning's name, so that it can be pickled."""
    name = f"{package}.callbacks.model_checkpoint"
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        parent = ".".join(parts[:count])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
    return callback


def test_lightning_checkpoint_without_lightning(tmp_path, monkeypatch):
    """A real one has classes of Lightning as keys and numpy scalars as learning rates.

    Neither package is imported.
    """
    path = tmp_path / "epoch=0.ckpt"
    older, newer = (
        pretend_lightning(monkeypatch, package)
        for package in ("pytorch_lightning", "lightning.pytorch")
    )
    instance = older()
    instance.best_model_path = "nowhere"
    content = {
        "epoch": 3,
        "state_dict": collections.OrderedDict(STATE),
        "callbacks": {older: {"best_model_score": torch.tensor(1.0)}, "other": [instance, newer]},
        "lr_schedulers": [{"_last_lr": [np.float64(6.4e-5)]}],
    }
    torch.save(content, path)
    monkeypatch.undo()
    allowed = set(torch.serialization.get_safe_globals())
    assert same(read_ldm_checkpoint(path), STATE)
    assert set(torch.serialization.get_safe_globals()) == allowed, (
        "the stand-ins outlive the reading"
    )


@pytest.mark.parametrize(("protocol", "named"), [(2, "system"), (4, "")])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, protocol, named):
    path, trace = tmp_path / "hostile.ckpt", tmp_path / "trace"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    torch.save({"state_dict": STATE, "x": Hostile()}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=rf"hostile\.ckpt.*{named}"):
        read_ldm_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is not hostile, so the test shows nothing"


def test_global_beyond_the_list_is_named(tmp_path):
    torch.save({"state_dict": STATE, "when": collections.deque([1])}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"collections\.deque"):
        read_ldm_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_truncated_file(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": STATE}, path)
    else:
        export_ldm(STATE, path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match=rf"weights\{suffix}.*check its size and checksum"):
        read_ldm_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ([1, 2], "state_dict"),
        ({"model": STATE}, "'model' is no tensor"),
        ({"state_dict": {"a": 1}}, "'a'.*no tensor"),
        ("<html>404</html>", "no whole checkpoint"),
        (None, "no such file"),
    ],
)
def test_not_an_ldm_checkpoint(tmp_path, content, complaint):
    path = tmp_path / "odd.ckpt"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"odd\.ckpt.*{complaint}") as caught:
        read_ldm_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_tensors_without_a_wrapper(tmp_path):
    torch.save(STATE, tmp_path / "bare.ckpt")
    assert same(read_ldm_checkpoint(tmp_path / "bare.ckpt"), STATE)


def test_split_components():
    tensors = [torch.tensor(float(i)) for i in range(5)]
    names = (
        "model.diffusion_model.out.2.bias",
        "first_stage_model.quant_conv.bias",
        "cond_stage_model.model.ln_final.bias",
        "betas",
        "model_ema.decay",
    )
    parts = split_components(dict(zip(names, tensors, strict=True)))
    assert parts == {
        "unet": {"out.2.bias": tensors[0]},
        "vae": {"quant_conv.bias": tensors[1]},
        "text": {"ln_final.bias": tensors[2]},
    }


def test_components_without_prefix():
    unet = {"input_blocks.0.0.weight": torch.zeros(1), "out.2.bias": torch.zeros(2)}
    vae = {"decoder.conv_in.weight": torch.zeros(1), "post_quant_conv.bias": torch.zeros(2)}
    training = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    assert split_components(unet) == {"unet": unet, "vae": {}, "text": {}}
    assert split_components({**vae, **training}) == {"unet": {}, "vae": vae, "text": {}}


def test_written_files_are_as_public_as_others(tmp_path):
    (tmp_path / "any").touch()
    export_ldm(STATE, tmp_path / "a.safetensors", {})
    export_diffusers(build(UNIFORM).state_dict(), UNIFORM, tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "a.safetensors", weights):
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_load_into():
    unet, other = build(MIXED), UNet(MIXED)
    load_into(other, unet.state_dict(), "the UNet", "w.ckpt")
    assert same(other.state_dict(), unet.state_dict())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("out.2.bias"), r"1 missing \(out\.2\.bias\)"),
        (
            lambda state: state.clear(),
            r"\d+ missing \(time_embed\.0\.weight, (\S+, ){8}\S+ and \d+ more\)",
        ),
        (
            lambda state: state.update(a=torch.zeros(1), b=torch.zeros(1)),
            r"2 unexpected \(a, b\)",
        ),
        (
            lambda state: state.update({"out.2.bias": torch.zeros(5)}),
            r"1 of another shape \(out\.2\.bias: \(5,\) there and \(4,\) in it\)",
        ),
    ],
)
def test_load_into_is_strict(change, complaint):
    unet = build(MIXED)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(
        CheckpointError, match=rf"^w\.ckpt: not the weights of the UNet.*{complaint}"
    ):
        load_into(unet, state, "the UNet", "w.ckpt")
    assert same(unet.state_dict(), before)


@pytest.mark.parametrize("config", [MIXED, UNIFORM], ids=["mixed", "uniform"])
def test_export_ldm_round_trip(tmp_path, config):
    state = build(config).to(memory_format=torch.channels_last).state_dict()
    path = tmp_path / "new" / "unet.safetensors"
    export_ldm(state, path, {"samples": "512000"})
    assert same(split_components(read_ldm_checkpoint(path))["unet"], state)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["samples"] == "512000"


def test_nothing_is_overwritten(tmp_path):
    state = build(MIXED).state_dict()
    path = tmp_path / "unet.safetensors"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        export_ldm(state, path, {})
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_diffusers(state, MIXED, tmp_path)
    assert path.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["unet", "unet.safetensors"]


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    state = build(MIXED).state_dict()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for module in (written_weights, diffusers_folder):
        monkeypatch.setattr(module, "save_safetensors", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        export_ldm(state, tmp_path / "unet.safetensors", {})
    with pytest.raises(CheckpointError, match="No space left"):
        export_diffusers(state, MIXED, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'sd-perf\[cli\]'"):
        export_ldm(STATE, tmp_path / "unet.safetensors", {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "it is [], not an object"),
        ('{"channels": "x"}', "channels is 'x', not a whole number"),
        ('{"channels": true}', "channels is True, not a whole number"),
        ('{"num_res_blocks": 65}', "num_res_blocks is 65, not of sizes from 1 to 64"),
        ('{"channels": -8}', "channels is -8, not of sizes from 1 to 65,536"),
        ('{"channel_mult": 3}', "channel_mult is 3, not a list"),
        ('{"channel_mult": [1, 2.5]}', "channel_mult[1] is 2.5, not a whole number"),
        ('{"channel_mult": [' + 99 * "1," + "1]}", "not of sizes"),
        ('{"channels": ' + 5000 * "9" + "}", "a number of 5000 digits"),
        ('{"sofa": 1}', "sofa"),
        (100_000 * "[", "nested deeper than 64"),
    ],
)
def test_hostile_metadata(tmp_path, text, reason):
    path = tmp_path / "a.safetensors"
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    safetensors.save_file({"x": torch.zeros(1)}, path, metadata={"config": text})
    with pytest.raises(CheckpointError, match="its metadata is no AutoencoderConfig") as error:
        safetensors_config(path, AutoencoderConfig)
    assert reason in str(error.value) and len(str(error.value)) < 600
