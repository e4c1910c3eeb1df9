"""Every section holds its fields to the rules in their types, and to those between fields."""

from __future__ import annotations

import dataclasses
import re
from typing import get_type_hints

import pytest

from sd_perf.config import (
    LINEAR_LAYERS,
    Config,
    Count,
    DataConfig,
    DiffusionConfig,
    KernelsConfig,
    OptimizerConfig,
    PrecisionConfig,
    Section,
    TrainingConfig,
    UNetConfig,
)
from sd_perf.errors import ConfigError

SECTIONS = {name: type(getattr(Config(), name)) for name in get_type_hints(Config)}
FAST = UNetConfig(implementation="fast")
DELAYED = PrecisionConfig(feed_forward="fp8_native", fp8_recipe="delayed")
COUNTS = [
    (section, field)
    for section, kind in SECTIONS.items()
    for field, hint in get_type_hints(kind, include_extras=True).items()
    if set(Count.__metadata__) & set(getattr(hint, "__metadata__", ()))
]


def test_counts_are_found():
    assert (
        len(COUNTS) > 20
        and ("training", "global_batch_size") in COUNTS
        and ("model", "model_channels") in COUNTS
    )


@pytest.mark.parametrize(("section", "field"), COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_is_at_least_one(section, field, value):
    with pytest.raises(
        ConfigError, match=rf"^{section}\.{field}: {value} cannot be used; it must be at least 1$"
    ):
        dataclasses.replace(getattr(Config(), section), **{field: value})


NUMBERS = [
    (section, field, type(default))
    for section, kind in SECTIONS.items()
    for field, hint in get_type_hints(kind).items()
    for default in [getattr(Config(), section).__dict__[field]]
    if hint in (int, float, int | None)
]


@pytest.mark.parametrize(("section", "field", "kind"), NUMBERS)
def test_every_number_has_limits(section, field, kind):
    """No integer is without an upper limit, and no float is infinite, NaN or lost in float32."""
    wrong = [float("inf"), float("-inf"), float("nan"), 1e39, 1e-46] if kind is float else [2**64]
    for value in [*wrong, -1e39 if kind is float else -1]:
        with pytest.raises(ConfigError, match=rf"^{section}\.{field}: .* cannot be used; it must"):
            dataclasses.replace(getattr(Config(), section), **{field: value})


def test_numbers_are_found():
    assert {("evaluation", "fid_target", float), ("optimizer", "epsilon", float)} < set(NUMBERS)
    assert len(NUMBERS) > 30 and ("diffusion", "beta_end", float) in NUMBERS


@pytest.mark.parametrize(
    ("section", "field", "value", "limit"),
    [
        ("training", "global_batch_size", 4 * 10**12, "1,000,000"),
        ("training", "cpu_threads", 10**6, "1,024"),
        ("data", "latent_size", 8 * 10**6, "2,048"),
        ("data", "prefetch_batches", 10**8, "1,024"),
        ("data", "workers", 10**6, "1,024"),
        ("diffusion", "num_timesteps", 10**11, "100,000"),
        ("model", "num_res_blocks", 10**4, "64"),
    ],
)
def test_limits(section, field, value, limit):
    given = {"path": "shards"} if section == "data" else {}
    with pytest.raises(ConfigError, match=rf"^{section}\.{field}: {value} .* at most {limit}$"):
        dataclasses.replace(getattr(Config(), section), **{field: value}, **given)


def test_levels_have_limits():
    with pytest.raises(ConfigError, match=r"^model\.channel_mult: .* at most 12 levels"):
        UNetConfig(channel_mult=(1,) * 13)
    with pytest.raises(ConfigError, match=r"^model\.channel_mult: .* multiples up to 64"):
        UNetConfig(channel_mult=(10**9,))


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_obey_rules_under_their_name(section):
    assert issubclass(SECTIONS[section], Section) and SECTIONS[section].section == section
    assert "section" not in get_type_hints(SECTIONS[section])  # no key of a preset


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: UNetConfig(model_channels=33), "model.model_channels: 33 ... even"),
        (lambda: UNetConfig(channel_mult=()), "model.channel_mult: () ... one positive multiple"),
        (
            lambda: UNetConfig(attention_resolutions=(3,)),
            "model.attention_resolutions: (3,) ... drawn from the levels'",
        ),
        (lambda: UNetConfig(transformer_groups=33), "model.transformer_groups: 33 ... a divisor"),
        (lambda: DiffusionConfig(beta_start=0.5), "diffusion.beta_start: 0.5 ... positive and at"),
        (lambda: DataConfig(), "data.path: '' ... the folder of the shards"),
        (
            lambda: OptimizerConfig(base_learning_rate=float("nan")),
            "optimizer.base_learning_rate: nan ... positive",
        ),
        (lambda: OptimizerConfig(warmup_start=1.1), "optimizer.warmup_start: 1.1 ... between 0"),
        (lambda: TrainingConfig(cpu_threads=0), "training.cpu_threads: 0 ... at least 1, or none"),
        (lambda: TrainingConfig(seed=2**63), f"training.seed: {2**63} ... in [0, 2**63)"),
        (
            lambda: UNetConfig(compile=True),
            "model.compile: True ... false, since model.implementation is 'plain'",
        ),
        (
            lambda: UNetConfig(activation_checkpointing=True),
            "model.activation_checkpointing: True ... false, since model.implementation is 'plain'",
        ),
        (
            lambda: PrecisionConfig(fp8_recipe="delayed"),
            "precision.fp8_recipe: 'delayed' ... current, since no layer",
        ),
        (lambda: Config().micro_batch_size(7), "training.global_batch_size: 512 ... a multiple of"),
    ],
)
def test_other_rules(make, sentence):
    with pytest.raises(
        ConfigError, match=re.escape(sentence.replace("...", "cannot be used; it must be"))
    ):
        make()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": UNetConfig()},
            "precision.text: 'fp8_te' ... bf16, since model.implementation is 'plain'",
        ),
        (
            {"training": TrainingConfig(precision="fp32")},
            "precision.text: 'fp8_te' ... bf16, since training.precision",
        ),
        (
            {"model": dataclasses.replace(FAST, context_dim=1032)},
            "precision.text: 'fp8_te' ... bf16, since FP8 takes multiples of 16 channels and text "
            "has layers of 1032",
        ),
        (
            {
                "model": UNetConfig(
                    model_channels=8,
                    num_head_channels=8,
                    resblock_groups=8,
                    transformer_groups=8,
                    implementation="fast",
                ),
                "precision": PrecisionConfig(linear="fp8_native"),
            },
            "precision.linear: 'fp8_native' ... bf16, since FP8 takes multiples of 16 channels "
            "and attention has",
        ),
        (
            {"model": dataclasses.replace(FAST, compile=True)},
            "model.compile: True ... false with precision.text in Transformer Engine",
        ),
        (
            {
                "model": dataclasses.replace(FAST, compile=True),
                "precision": PrecisionConfig(linear="fp8_native"),
                "kernels": KernelsConfig(fp8_linear="te"),
            },
            "model.compile: True ... false with precision.linear in Transformer Engine",
        ),
        (
            {
                "model": dataclasses.replace(FAST, activation_checkpointing=True),
                "precision": PrecisionConfig(linear="fp8_te", fp8_recipe="delayed"),
            },
            "precision.fp8_recipe: 'delayed' ... current with model.activation_checkpointing",
        ),
        (
            {"model": dataclasses.replace(FAST, compile=True), "precision": DELAYED},
            "model.compile: True ... false with precision.fp8_recipe delayed",
        ),
        (
            {"precision": DELAYED, "kernels": KernelsConfig(fp8_linear="te")},
            "kernels.fp8_linear: 'te' ... auto, triton or reference with fp8_native and",
        ),
    ],
)
def test_rules_of_fp8(changes, sentence):
    allowed = {"model": FAST, "precision": PrecisionConfig(text="fp8_te")}
    Config(**allowed)
    with pytest.raises(
        ConfigError, match=re.escape(sentence.replace("...", "cannot be used; it must be"))
    ):
        Config(**{**allowed, **changes})


def test_native_layers_may_have_delayed_scales_and_be_computed_again():
    model = dataclasses.replace(FAST, activation_checkpointing=True)
    assert Config(model=model, precision=DELAYED).precision.fp8_recipe == "delayed"


def test_a_class_of_layers_is_as_linear_unless_it_says():
    precision = PrecisionConfig(linear="fp8_native", text="bf16")
    assert {layers: precision.of(layers) for layers in LINEAR_LAYERS} == {
        "attention": "fp8_native",
        "feed_forward": "fp8_native",
        "transformer_ends": "fp8_native",
        "text": "bf16",
    }
    keys = {
        layers: key
        for layers, _, key in PrecisionConfig(linear="fp8_te", text="fp8_native").in_fp8()
    }
    assert keys == {
        "attention": "linear",
        "feed_forward": "linear",
        "transformer_ends": "linear",
        "text": "text",
    }


def test_what_changes_speed_only_leaves_the_network():
    fast = UNetConfig(implementation="fast", activation_checkpointing=True, compile=True)
    assert fast.network == UNetConfig()
    assert dataclasses.replace(fast, context_dim=768).network == UNetConfig(context_dim=768)


def test_none_where_it_is_allowed():
    assert TrainingConfig(seed=None, cpu_threads=None).seed is None


def test_the_prediction_has_the_channels_of_the_latents() -> None:
    assert UNetConfig(in_channels=8, out_channels=8).out_channels == 8
    with pytest.raises(ConfigError, match=r"model\.out_channels: 8 .* model\.in_channels \(4\)"):
        UNetConfig(out_channels=8)
