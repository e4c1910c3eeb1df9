"""Config files that cannot be used: one sentence of what, where and what to do; exit code 2."""

from __future__ import annotations

import pytest

from tests.cli.bad_input import (
    matches,
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainig: {max_samples: 4}", ["trainig: unknown key", "did you mean training?"]),
        (
            "training: {max_sample: 4}",
            ["training.max_sample: unknown key", "did you mean training.max_samples?"],
        ),
        (
            "training: {qwertyuiop: 4}",
            ["training.qwertyuiop: unknown key", "known here: global_batch_size"],
        ),
        ("training: {max_samples: many}", ["training.max_samples: 'many'", "a whole number"]),
        ("training: {max_samples: 4.5}", ["training.max_samples: 4.5", "a whole number"]),
        ("training: {deterministic: 1}", ["training.deterministic: 1", "true or false"]),
        ("training: {precision: fp16}", ["training.precision: 'fp16'", "one of fp32, bf16"]),
        ("optimizer: {epsilon: [1]}", ["optimizer.epsilon: [1]", "a number"]),
        ("optimizer: {epsilon: 1" + 400 * "0" + "}", ["optimizer.epsilon: 1", "a number"]),
        ("model: {channel_mult: 3}", ["model.channel_mult: 3", "a list"]),
        ("run: {dir: 7}", ["run.dir: 7", "text"]),
        ("training: 4", ["training: 4", "a section of keys"]),
        ("training:", ["training: None", "a section of keys"]),
        ("training: {max_samples: 0}", ["training.max_samples: 0", "at least 1"]),
        ("optimizer: {beta_2: 1.0}", ["optimizer.beta_2: 1.0", "in [0, 1)"]),
        (
            "optimizer: {base_learning_rate: .nan}",
            ["optimizer.base_learning_rate: nan", "positive"],
        ),
        (
            "model: {num_head_channels: 48}",
            ["model.num_head_channels: 48", "a divisor of every level's channels"],
        ),
        ("data: {format: synthetic, latent_size: 9}", ["data.latent_size: 9", "a multiple of 8"]),
        ("data: {format: moments}", ["data.path: ''", "data.format to synthetic"]),
        ("kernels: {geglo: triton}", ["kernels.geglo: unknown key", "did you mean kernels.geglu?"]),
        ("kernels: {geglu: 4}", ["kernels.geglu: 4", "text"]),
        ("checkpoint: {keep: 0}", ["checkpoint.keep: 0", "none to keep all"]),
        ("training: [", ["cannot be read as YAML", "line 1"]),
        ("- training", ["must hold sections", "not a list"]),
        ("\0", ["cannot be read as YAML"]),
        ("extends: absent.yaml", ["absent.yaml: no such config file", "bad.yaml extends it"]),
        ("extends: bad.yaml", ["bad.yaml: extends itself", "take `extends` out"]),
        ("extends: middle.yaml", ["bad.yaml: extends itself"]),
    ],
)
def test_config_file(text, parts, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "middle.yaml").write_text("extends: bad.yaml")
    matches(refused("train", "--config", "bad.yaml"), "bad.yaml", *parts)
    assert len(list(tmp_path.iterdir())) == 2


def test_config_file_is_missing_or_no_text(tmp_path, refused):
    matches(
        refused("train", "--config", tmp_path / "no.yaml"),
        tmp_path / "no.yaml",
        "no such config file",
        "configs/",
    )
    matches(refused("train", "--config", tmp_path), "cannot be read (it is a folder)")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for command in (["train"], ["data", "prepare"], ["data", "statistics"]):
        matches(
            refused(*command, "--config", tmp_path / "binary.yaml"),
            "binary.yaml: cannot be read as YAML",
        )
