"""Presets as text: what is printed can be read again, and the schema agrees with the reader."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sd_perf.config import Config, RunConfig
from sd_perf.config.descriptions import field_descriptions
from sd_perf.errors import ConfigError
from sd_perf.presets import load_preset, parse_value
from sd_perf.tools.config_text import _value, as_yaml, schema
from tests.small_run import small_config

ROOT = Path(__file__).parent.parent.parent
PRESETS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/recipes/*.yaml")])


@pytest.mark.parametrize("changed_only", [False, True])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_what_is_shown_is_the_same_preset(preset: Path, changed_only: bool, tmp_path: Path) -> None:
    config = load_preset(preset)
    (tmp_path / "shown.yaml").write_text(as_yaml(config, changed_only))
    assert load_preset(tmp_path / "shown.yaml") == config


def test_a_config_of_synthetic_data_is_shown_as_such(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    (tmp_path / "shown.yaml").write_text(as_yaml(config, changed_only=True))
    assert load_preset(tmp_path / "shown.yaml") == config


@given(st.text(max_size=20))
@example("1e5")
@example("no")
@example("a # b: c\n")
@example("…")
def test_any_text_is_read_again(text: str) -> None:
    try:
        shown = _value(text)
    except AssertionError:
        pytest.fail(f"{text!r} has no YAML")
    assert "\n" not in shown and parse_value(shown) == text


def test_every_key_is_explained() -> None:
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        descriptions = field_descriptions(type(values))
        for field in dataclasses.fields(values):
            assert descriptions[field.name], f"{section.name}.{field.name}"


def test_show(preset: Path, sd_perf) -> None:
    code, output, _ = sd_perf("config", "show", "--config", preset, "--training.seed", 7)
    assert code == 0
    assert "  # samples per optimizer step, over all ranks and accumulation steps\n" in output
    assert "  global_batch_size: 4    # default: 512\n" in output
    assert yaml.safe_load(output)["training"]["seed"] == 7
    code, output, _ = sd_perf("config", "show", "--config", preset, "--changed")
    assert code == 0 and "num_workers" not in output and "kernels:" not in output


def test_diff_of_a_preset_and_a_run(preset: Path, tmp_path: Path, sd_perf, refused) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = dataclasses.replace(load_preset(preset), run=RunConfig(dir="elsewhere"))
    manifest = {"config": json.loads(json.dumps(dataclasses.asdict(config))), "starts": []}
    (run / "run_manifest.json").write_text(json.dumps(manifest))
    code, output, _ = sd_perf("config", "diff", preset, run)
    assert code == 0 and "run.dir" in output and "elsewhere" in output
    assert "training.seed" not in output
    assert "the configs are the same" in sd_perf("config", "diff", run, run)[1]
    assert "no such config file" in refused("config", "diff", tmp_path / "no.yaml", run)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_schema_takes_every_preset(preset: Path, validate) -> None:
    assert validate(yaml.load(preset.read_text(), _Editor)) == []


class _Editor(yaml.SafeLoader):
    """YAML 1.2 as editors read it: 28_000 is text."""


_Editor.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Editor.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)


@pytest.fixture(scope="module")
def validate() -> Any:
    """validate(tree) -> the keys that the schema finds fault with."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs pip install jsonschema")
    validator = jsonschema.Draft7Validator(schema())
    jsonschema.Draft7Validator.check_schema(schema())
    return lambda tree: [".".join(map(str, fault.path)) for fault in validator.iter_errors(tree)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "max_sample", 4),
        ("training", "global_batch_size", 0),
        ("training", "global_batch_size", 2_000_000),
        ("training", "global_batch_size", "4 samples"),
        ("training", "seed", -1),
        ("training", "precision", "fp8"),
        ("training", "deterministic", "perhaps"),
        ("optimizer", "beta_1", 1.0),
        ("optimizer", "epsilon", 0.0),
        ("logging", "sinks", ["excel"]),
        ("model", "channel_mult", 3),
    ],
)
def test_what_the_reader_refuses_the_schema_refuses(section, key, value, tmp_path, validate):
    tree = {section: {key: value}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError):
        load_preset(tmp_path / "bad.yaml")
    assert validate(tree)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "seed", None),
        ("training", "max_samples", "28_000"),
        ("optimizer", "weight_decay", 0),
        ("precision", "attention", None),
        ("logging", "sinks", ["csv", "wandb"]),
    ],
)
def test_what_the_reader_takes_the_schema_takes(section, key, value, tmp_path, validate):
    (tmp_path / "good.yaml").write_text(
        f"{section}:\n  {key}: {json.dumps(value).strip(chr(34))}\n"
    )
    load_preset(tmp_path / "good.yaml")
    assert validate({section: {key: value}}) == []


def test_the_schema_is_written_to_a_file(tmp_path: Path, sd_perf) -> None:
    code, output, _ = sd_perf("config", "schema", "--output", tmp_path / "preset.schema.json")
    assert code == 0 and output.strip() == str(tmp_path / "preset.schema.json")
    assert json.loads((tmp_path / "preset.schema.json").read_text()) == schema()
