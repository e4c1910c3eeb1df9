"""The configuration: every option of a run, with its unit, its default and its rule.

A module holds the sections that a reader looks for together. Presets are YAML files, which
`sd_perf.presets` reads. This package needs the standard library alone, so that the model and the
step can be imported where nothing but torch is installed.
"""

from sd_perf.config.config import Config
from sd_perf.config.data import DataConfig
from sd_perf.config.evaluation import EvaluationConfig, SamplingConfig
from sd_perf.config.kernels import KernelsConfig
from sd_perf.config.model import (
    FIRST_WEIGHTS,
    LINEAR_LAYERS,
    SPEED_ONLY,
    Arithmetic,
    DiffusionConfig,
    PrecisionConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sd_perf.config.rules import (
    SEED,
    Count,
    Decay,
    NotNegative,
    Positive,
    Rule,
    Samples,
    Section,
)
from sd_perf.config.run import (
    CheckpointConfig,
    LoggingConfig,
    MLPerfConfig,
    ProfileConfig,
    RunConfig,
)
from sd_perf.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "FIRST_WEIGHTS",
    "LINEAR_LAYERS",
    "SEED",
    "SPEED_ONLY",
    "Arithmetic",
    "CheckpointConfig",
    "Config",
    "Count",
    "DataConfig",
    "Decay",
    "DiffusionConfig",
    "EvaluationConfig",
    "KernelsConfig",
    "LoggingConfig",
    "MLPerfConfig",
    "NotNegative",
    "OptimizerConfig",
    "Positive",
    "PrecisionConfig",
    "ProfileConfig",
    "Rule",
    "RunConfig",
    "Samples",
    "SamplingConfig",
    "Section",
    "TextEncoderConfig",
    "TrainingConfig",
    "UNetConfig",
]
