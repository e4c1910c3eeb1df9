"""The whole config of a run: one field per section, and the rules between sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from sd_perf.config.data import DataConfig
from sd_perf.config.evaluation import EvaluationConfig, SamplingConfig
from sd_perf.config.kernels import KernelsConfig
from sd_perf.config.model import DiffusionConfig, PrecisionConfig, TextEncoderConfig, UNetConfig
from sd_perf.config.run import (
    CheckpointConfig,
    LoggingConfig,
    MLPerfConfig,
    ProfileConfig,
    RunConfig,
)
from sd_perf.config.training import OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Config:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(format="synthetic"))
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mlperf: MLPerfConfig = field(default_factory=MLPerfConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        factor = self.model.downsampling
        right = f"a multiple of {factor}, the factor between the UNet's first and last level"
        self.data.require(self.data.latent_size % factor == 0, "latent_size", right)
        right = 'a file of weights (or "random"), since data.context is open_clip'
        self.text_encoder.require(
            not self.encodes_text or bool(self.text_encoder.weights), "weights", right
        )
        right = (
            "0, or text_encoder.weights the file that made the shards' text states: with "
            "data.context precomputed it gives those of the empty caption"
        )
        has_empty = self.encodes_text or bool(self.text_encoder.weights)
        self.data.require(has_empty or not self.data.drop_captions, "drop_captions", right)
        timesteps = self.diffusion.num_timesteps
        right = f"at most diffusion.num_timesteps ({timesteps})"
        self.sampling.require(self.sampling.steps <= timesteps, "steps", right)
        for layers, arithmetic, key in self.precision.in_fp8():
            self._require_fp8(layers, arithmetic, key)
        if self.precision.fp8_recipe == "delayed":
            self._require_delayed()

    def _require_delayed(self) -> None:
        """The rules between delayed scaling and the other sections."""
        model, precision, is_native = self.model, self.precision, self.precision.uses("fp8_native")
        # Transformer Engine moves its histories on with every forward pass, so that a block which
        # is computed again would enter its magnitudes twice. fp8_native does so once a step.
        again = model.activation_checkpointing and precision.uses("fp8_te")
        right = (
            "current with model.activation_checkpointing and fp8_te: computing again would enter"
        )
        precision.require(not again, "fp8_recipe", f"{right} magnitudes twice")
        right = "false with precision.fp8_recipe delayed, whose scales change in the backward pass"
        model.require(not (is_native and model.compile), "compile", right)
        right = "auto, triton or reference with fp8_native and precision.fp8_recipe delayed"
        is_te = is_native and self.kernels.fp8_linear == "te"
        self.kernels.require(not is_te, "fp8_linear", right)

    def _require_fp8(self, layers: str, arithmetic: str, key: str) -> None:
        """The rules between a class of layers in FP8 and the other sections.

        `key` is the field of `precision` that gives the class its arithmetic.
        """
        model, precision = self.model, self.precision
        right = f"bf16, since model.implementation is {model.implementation!r}, which has no FP8"
        precision.require(model.implementation == "fast", key, right)
        right = f"bf16, since training.precision is {self.training.precision!r}"
        precision.require(self.training.precision == "bf16", key, right)
        widths = [*model.transformer_channels, *([model.context_dim] if layers == "text" else [])]
        odd = next((width for width in widths if width % 16), None)
        right = f"bf16, since FP8 takes multiples of 16 channels and {layers} has layers of {odd}"
        precision.require(odd is None, key, right)
        transformer_engine = arithmetic == "fp8_te" or self.kernels.fp8_linear == "te"
        right = (
            f"false with precision.{key} in Transformer Engine, which torch.compile cannot trace"
        )
        model.require(not (transformer_engine and model.compile), "compile", right)

    @property
    def encodes_text(self) -> bool:
        """Whether a training step encodes captions, so that it needs the text encoder."""
        return self.data.format != "synthetic" and self.data.context == "open_clip"

    @property
    def learning_rate(self) -> float:
        """Learning rate after warm-up: base_learning_rate x global_batch_size."""
        return self.optimizer.base_learning_rate * self.training.global_batch_size

    def micro_batch_size(self, world_size: int) -> int:
        """Samples per rank and forward pass; ConfigError where the global batch does not divide."""
        batch, accumulate = self.training.global_batch_size, self.training.accumulate_steps
        parts = world_size * accumulate
        right = f"a multiple of ranks x accumulate_steps = {world_size} x {accumulate}"
        self.training.require(batch % parts == 0, "global_batch_size", right)
        return batch // parts

    def steps_of(self, samples: int) -> int:
        """Optimizer steps that cover so many samples: ceil(samples / global_batch_size)."""
        return -(-samples // self.training.global_batch_size)
