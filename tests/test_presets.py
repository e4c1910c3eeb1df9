"""Presets: words that YAML 1.1 reads as something else, keys given twice, and hostile files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd_perf.config import Config, RunConfig
from sd_perf.errors import ConfigError
from sd_perf.presets import MAX_PRESET_BYTES, load_preset


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str) -> Config:
        path = tmp_path / "preset.yaml"
        path.write_text(text, encoding="utf-8")
        return load_preset(path)

    return load


def refuses(load, text: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    said = str(error.value)
    assert "preset.yaml: " in said and "\n" not in said and len(said) < 600
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "training:\n  max_samples: 8\nrun:\n  note: a\ntraining:\n  seed: 1\n",
            "training: given twice, on lines 1 and 5; keep one",
        ),
        ("training:\n  seed: 1\n\n  seed: 1\n", "training.seed: given twice, on lines 2 and 4"),
        ("extends: a.yaml\nextends: b.yaml\n", "extends: given twice, on lines 1 and 2"),
    ],
)
def test_a_key_given_twice(load, text, sentence):
    refuses(load, text, sentence)


@pytest.mark.parametrize("word", ["1:30", "010", "0o17", "2026-05-01", "yes", "1_000.5.1"])
def test_a_word_is_no_whole_number(load, word):
    refuses(load, f"training:\n  max_samples: {word}\n", f"training.max_samples: '{word}'")
    assert load(f"run:\n  note: {word}\n").run.note == word


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y", "N"])
def test_a_word_for_text_stays_that_word(load, word):
    assert load(f"run:\n  note: {word}\n").run.note == word


@pytest.mark.parametrize(
    ("word", "value"),
    [("yes", True), ("on", True), ("true", True), ("no", False), ("Off", False), ("False", False)],
)
def test_words_for_true_and_false(load, word, value):
    assert load(f"training:\n  deterministic: {word}\n").training.deterministic is value


@pytest.mark.parametrize(
    ("word", "value"),
    [("5_120_000", 5_120_000), ("+7", 7), ("0x10", 16), ("12", 12)],
)
def test_whole_numbers(load, word, value):
    assert load(f"training:\n  max_samples: {word}\n").training.max_samples == value


@pytest.mark.parametrize(
    ("word", "value"), [("1e-4", 1e-4), ("1.5E-4", 1.5e-4), (".5", 0.5), ("2.", 2.0), ("3", 3.0)]
)
def test_numbers(load, word, value):
    assert load(f"optimizer:\n  epsilon: {word}\n").optimizer.epsilon == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: &a [x]\nrun: *a", ["line 2: the alias *a is refused"]),
        (
            "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcd", "bcde", strict=True)),
            ["alias"],
        ),
        ("run: {note: !!binary aGk=}", ["line 1: the tag", "is refused"]),
        ("run: {note: !!timestamp nonsense}", ["is refused"]),
        ("run: {note: !!python/object/apply:os.system [id]}", ["is refused"]),
        ("[" * 100_000, ["nested deeper than 16"]),
        ("{a: " * 30_000, ["nested deeper than 16"]),
        ("- " * 50_000, ["nested deeper than 16"]),
        (f"training: {{seed: {5000 * '9'}}}", ["cannot be read as YAML"]),
        (f"optimizer: {{epsilon: {4000 * '9'}}}", ["optimizer.epsilon", "must be a number"]),
        (f"training: {{seed: {2**70}}}", ["training.seed", "must be a whole number"]),
        (f"model: {{channel_mult: [{5_000 * '1,'}]}}", ["a list of at most 64"]),
        (f"run: {{{900 * 'x'}: 1}}", ["unknown key"]),
        (f"run: {{note: [{200_000 * 'x'}]}}", ["run.note", "must be text"]),
        ("? [a]\n: 1", ["line 1: a key must be a word"]),
        ("extends: [a]", ["extends: ['a'] cannot be used"]),
        ('extends: "a\\0b"', ["no such config file"]),
        (f"extends: {1000 * 'x'}", ["File name too long"]),
        ("a: 1\n---\nb: 2", ["cannot be read as YAML"]),
    ],
)
def test_hostile_text(load, text, parts):
    with pytest.raises(ConfigError) as error:
        load(text)
    said = str(error.value)
    assert "\n" not in said and len(said) < 1500
    assert all(part in said for part in parts), said


def test_what_is_no_file_of_text(load, tmp_path):
    refuses(load, "#" * (MAX_PRESET_BYTES + 1), f"has more than {MAX_PRESET_BYTES:,} bytes")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("absent")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, reason in [
        ("loop", "symbolic links"),
        ("dangling", "No such file"),
        ("folder", "it is a folder"),
        ("fifo", "it is a FIFO"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}\.yaml: cannot be read \(.*{reason}"):
            load_preset(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("", "the name of a folder"),
        ("~", "a path without ~"),
        ("~/runs", "a path without ~"),
        ("~anna/runs", "a path without ~"),
        ("a\0b", "a path that a disk can hold"),
        ("\ud800", "a path that a disk can hold"),
        (256 * "x", "a path that a disk can hold"),
        (3000 * "x/", "a path that a disk can hold"),
    ],
)
def test_a_path_that_nobody_means(value, right):
    with pytest.raises(ConfigError, match=rf"run\.dir: .* cannot be used; it must be {right}"):
        RunConfig(dir=value)


def test_paths_of_the_other_sections(load):
    for key in ("data.path", "data.index", "evaluation.prompts", "text_encoder.weights"):
        section, name = key.split(".")
        refuses(load, f"{section}: {{{name}: ~/x, }}", f"{key}: '~/x'", "a path without ~")


def test_a_tilde_within_a_path_is_a_name():
    assert RunConfig(dir="runs/~a").dir == "runs/~a"
