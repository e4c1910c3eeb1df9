"""The rules of the closed division for Stable Diffusion v2, as data.

From MLCommons' training rules, ruleset 5.0.0. Free in the closed division are the learning rate,
the warm-up steps, the batch size, and everything that changes nothing but speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sd_perf.config import FIRST_WEIGHTS, SPEED_ONLY, Config, DiffusionConfig, UNetConfig
from sd_perf.errors import ConfigError

RULESET = "5.0.0"
EVAL_SAMPLES = 30_000
"""prompts per scored checkpoint"""
CHECKPOINT_SAMPLES = 512_000
"""samples between two checkpoints, to be rounded up to whole batches"""
FID_TARGET = 90.0
"""largest FID that passes"""
CLIP_TARGET = 0.15
"""smallest CLIP score that passes, at the same checkpoint"""

_OPTIMIZER = "AdamW's constants are fixed; free are learning rate, warm-up steps and batch size"
_SCHEDULE = "the schedule is the reference's: linear from 1e-6 of the rate, then constant"
_PLAIN_TRAINING = "the reference trains without it, and scores the weights themselves"
_SAMPLER = "checkpoints are scored on pictures of 50 DDIM steps with guidance 8"
_TARGET = (
    "a run has converged at FID 90 or less and CLIP score 0.15 or more, both at one checkpoint"
)
_DATA = "the training set is used as it is, every sample once per epoch"

FIXED: dict[str, tuple[Any, str]] = {
    "data.latent_size": (64, "images keep the reference's size, 512 x 512, latents 64 x 64"),
    "data.context_tokens": (77, "the text states are those of the reference, 77 tokens"),
    "data.allow_empty_captions": (True, _DATA),
    "data.max_bad_samples": (0, _DATA),
    "data.drop_captions": (0.0, _DATA),
    "data.random_flip": (False, _DATA),
    "data.random_crop": (False, _DATA),
    "text_encoder.model": ("ViT-H-14", "the text encoder is the reference's, frozen"),
    "optimizer.beta_1": (0.9, _OPTIMIZER),
    "optimizer.beta_2": (0.999, _OPTIMIZER),
    "optimizer.epsilon": (1e-8, _OPTIMIZER),
    "optimizer.weight_decay": (0.01, _OPTIMIZER),
    "optimizer.warmup_start": (1e-6, _SCHEDULE),
    "optimizer.decay_steps": (0, _SCHEDULE),
    "optimizer.decay_shape": ("linear", _SCHEDULE),
    "training.seed": (
        None,
        "seeds come from the clock or the system's entropy, anew for every run",
    ),
    "training.ema_decay": (0.0, _PLAIN_TRAINING),
    "training.min_snr_gamma": (0.0, _PLAIN_TRAINING),
    "checkpoint.keep": (None, "every checkpoint up to the first that passes may have to be scored"),
    "sampling.steps": (50, _SAMPLER),
    "sampling.guidance_scale": (8.0, _SAMPLER),
    "evaluation.num_prompts": (
        EVAL_SAMPLES,
        "a checkpoint is scored on the 30,000 prompts of COCO 2014",
    ),
    "evaluation.fid_target": (FID_TARGET, _TARGET),
    "evaluation.clip_target": (CLIP_TARGET, _TARGET),
    "mlperf.caches_cleared": (
        True,
        "file caches are dropped before every run (then set it to true)",
    ),
}
"""config key: (the only value allowed, the rule)"""

for _section, _defaults, _rule in (
    ("model", UNetConfig(), "the network is the reference's UNet of 865,910,724 parameters"),
    ("diffusion", DiffusionConfig(), "noise schedule, loss and latents are the reference's"),
):
    names = [field.name for field in dataclasses.fields(_defaults) if field.name not in SPEED_ONLY]
    FIXED |= {f"{_section}.{name}": (getattr(_defaults, name), _rule) for name in names}
for _name in FIRST_WEIGHTS:
    FIXED[f"model.{_name}"] = (getattr(UNetConfig, _name), "training begins from random weights")

PRECISIONS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8")
"""number formats that the rules approve in advance"""


def violations(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    """Values that the closed division forbids, each as (key, value, what is allowed, rule)."""
    for key, (allowed, rule) in FIXED.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value != allowed:
            yield key, value, "not set" if allowed in (None, "") else repr(allowed), rule
    yield from _of_data(config)
    if config.training.precision not in PRECISIONS:
        yield (
            "training.precision",
            config.training.precision,
            f"one of {PRECISIONS}",
            "approved number formats",
        )
    if config.text_encoder.weights == "random":
        yield "text_encoder.weights", "random", "a file", FIXED["text_encoder.model"][1]
    batch, every = config.training.global_batch_size, config.checkpoint.every_samples
    cadence = config.steps_of(CHECKPOINT_SAMPLES) * batch
    if config.steps_of(every) * batch != cadence:
        rule = f"checkpoints are CEIL(512000 / {batch}) steps apart"
        yield (
            "checkpoint.every_samples",
            every,
            f"{CHECKPOINT_SAMPLES} (here {cadence:,} samples)",
            rule,
        )
    if config.training.max_samples < 2 * CHECKPOINT_SAMPLES:
        rule = "at least two checkpoints are scored"
        yield (
            "training.max_samples",
            config.training.max_samples,
            f"at least {2 * CHECKPOINT_SAMPLES}",
            rule,
        )


def _of_data(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    """Violations of the rules on the data's format: frozen preprocessing is free, its result not.

    docs/data.md says what accepted submissions have done.
    """
    format, image_range = config.data.format, config.data.image_range
    if format == "synthetic":
        allowed = "moments, raw or encoded"
        yield "data.format", format, allowed, "training is on the benchmark's own data"
    if format in ("raw", "encoded") and image_range != "benchmark":
        rule = "the reference gives its encoder pixels in [0, 1]"
        yield "data.image_range", image_range, "'benchmark'", rule


def require_closed(config: Config) -> None:
    """ConfigError for the first violation: the key, its value, what is allowed, and the rule."""
    for key, value, allowed, rule in violations(config):
        raise ConfigError(
            f"{key}: {value!r} is not allowed in the closed division, only {allowed}: {rule}; "
            "change it, or set "
            f"mlperf.division to open"
        )
