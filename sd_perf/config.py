"""The configuration tree: what every field means, its unit, and the rules it must obey.

Presets are YAML files read by `sd_perf.presets`; this file needs the standard library alone, so that the model and
the step can be imported where nothing but torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sd_perf.errors import ConfigError


def _require(ok: bool, key: str, value: object, right: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {value!r} cannot be used; it must be {right}")


@dataclass(frozen=True)
class UNetConfig:
    """The denoising UNet. Defaults are the benchmark's 865,910,724-parameter network."""

    in_channels: int = 4
    """channels of the latents"""
    out_channels: int = 4
    """channels of the prediction"""
    model_channels: int = 320
    """channels of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """channels of each level, in units of model_channels"""
    num_res_blocks: int = 2
    """ResBlocks per level on the way down (one more on the way up)"""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """down-sampling factors of the levels that have transformers"""
    num_head_channels: int = 64
    """channels per attention head"""
    context_dim: int = 1024
    """channels of the text states"""
    resblock_groups: int = 16
    """GroupNorm groups in ResBlocks and the head (the benchmark has 16, published SD v2 has 32)"""
    transformer_groups: int = 32
    """GroupNorm groups at the entrance of each transformer"""

    def __post_init__(self) -> None:
        for name in (
            "in_channels",
            "out_channels",
            "model_channels",
            "num_res_blocks",
            "num_head_channels",
            "context_dim",
            "resblock_groups",
            "transformer_groups",
        ):
            _require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "at least 1")
        _require(self.model_channels % 2 == 0, "model.model_channels", self.model_channels, "even")
        _require(
            bool(self.channel_mult) and min(self.channel_mult) > 0,
            "model.channel_mult",
            self.channel_mult,
            "one positive multiple per level",
        )
        factors = tuple(2**level for level in range(len(self.channel_mult)))
        _require(
            set(self.attention_resolutions) <= set(factors),
            "model.attention_resolutions",
            self.attention_resolutions,
            f"drawn from the levels' factors {factors}",
        )
        for mult in self.channel_mult:
            channels = mult * self.model_channels
            _require(
                channels % self.num_head_channels == 0,
                "model.num_head_channels",
                self.num_head_channels,
                f"a divisor of every level's channels (here {channels})",
            )
            _require(
                channels % self.resblock_groups == 0,
                "model.resblock_groups",
                self.resblock_groups,
                f"a divisor of every level's channels (here {channels})",
            )
            _require(
                channels % self.transformer_groups == 0,
                "model.transformer_groups",
                self.transformer_groups,
                f"a divisor of every level's channels (here {channels})",
            )

    @property
    def downsampling(self) -> int:
        """Factor between the latents and the UNet's smallest level; latent sides must be multiples of it."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (LDM's "linear", diffusers' "scaled_linear") and the scale of the latents."""

    num_timesteps: int = 1000
    """timesteps of the forward process"""
    beta_start: float = 0.00085
    """first variance step"""
    beta_end: float = 0.0120
    """last variance step"""
    latent_scale: float = 0.18215
    """latents = latent_scale x a sample of the autoencoder's moments"""

    def __post_init__(self) -> None:
        _require(self.num_timesteps > 0, "diffusion.num_timesteps", self.num_timesteps, "at least 1")
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            "diffusion.beta_start",
            self.beta_start,
            f"positive and at most beta_end ({self.beta_end})",
        )
        _require(self.latent_scale > 0, "diffusion.latent_scale", self.latent_scale, "positive")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    format: Literal["moments", "synthetic"] = "moments"
    """moments: the benchmark's tar shards; synthetic: drawn from the seed, no files"""
    path: str = ""
    """folder of the *.tar shards"""
    index: str = ""
    """file that keeps the byte offsets of every sample (default: sd_perf_index.npz in the shards' folder)"""
    latent_size: int = 64
    """height and width of the latents, latent pixels"""
    context: Literal["precomputed", "open_clip"] = "open_clip"
    """text states: read from <key>.context.npy in the shards, or made from captions in every step"""
    context_tokens: int = 77
    """text tokens per caption"""
    workers: int = 4
    """threads that read and decode"""
    prefetch_batches: int = 4
    """micro-batches made ready ahead of the step"""
    max_bad_samples: int = 0
    """samples that may be replaced by their successor before the run stops, summed over ranks"""
    allow_empty_captions: bool = False
    """take samples whose caption is empty, as the benchmark does"""
    max_caption_bytes: int = 4096
    """longest caption taken, bytes of UTF-8"""

    def __post_init__(self) -> None:
        for name in ("latent_size", "context_tokens", "workers", "prefetch_batches", "max_caption_bytes"):
            _require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "at least 1")
        _require(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        _require(
            self.format == "synthetic" or bool(self.path),
            "data.path",
            self.path,
            "the folder of the moments shards (or set data.format to synthetic)",
        )


@dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen OpenCLIP text tower, used when data.context is open_clip and for sampling."""

    model: str = "ViT-H-14"
    """open_clip model name, or the path of an open_clip model JSON"""
    weights: str = ""
    """file of weights (open_clip .bin/.pt/.safetensors, or an LDM .ckpt), or "random" for seeded random ones"""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW over every parameter, and the learning-rate schedule."""

    base_learning_rate: float = 1.25e-7
    """learning rate per sample: the rate after warm-up is this x training.global_batch_size"""
    warmup_steps: int = 1000
    """optimizer steps of linear warm-up, from warmup_start x the full rate"""
    warmup_start: float = 1e-6
    """fraction of the full rate at the first step"""
    beta_1: float = 0.9
    """decay of the first moment"""
    beta_2: float = 0.999
    """decay of the second moment"""
    epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.01
    """decoupled weight decay, on every parameter"""

    def __post_init__(self) -> None:
        _require(self.base_learning_rate > 0, "optimizer.base_learning_rate", self.base_learning_rate, "positive")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.warmup_start <= 1, "optimizer.warmup_start", self.warmup_start, "between 0 and 1")
        for name in ("beta_1", "beta_2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        _require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "positive")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and arithmetic of the run."""

    global_batch_size: int = 512
    """samples per optimizer step, over all ranks and accumulation steps"""
    accumulate_steps: int = 1
    """micro-batches per optimizer step on each rank"""
    max_samples: int = 5_120_000
    """length of the run, samples (rounded up to whole steps)"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32 everywhere, or bf16 autocast over fp32 weights"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one and says what it took"""
    cpu_threads: int | None = None
    """threads of CPU arithmetic per process; none: as many as torch likes"""
    seed: int | None = None
    """seed of weights, data order and every draw; none: drawn from system entropy and kept in the manifest"""
    deterministic: bool = False
    """deterministic GPU algorithms, slower (CPU runs always are)"""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "accumulate_steps", "max_samples"):
            _require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "at least 1")
        _require(
            self.cpu_threads is None or self.cpu_threads > 0,
            "training.cpu_threads",
            self.cpu_threads,
            "at least 1, or none",
        )
        _require(self.seed is None or 0 <= self.seed < 2**63, "training.seed", self.seed, "in [0, 2**63)")


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is written, and how much of it is kept."""

    every_samples: int = 512_000
    """distance between checkpoints, samples (rounded up to whole steps)"""
    keep: int | None = None
    """newest checkpoints kept; none keeps all"""

    def __post_init__(self) -> None:
        _require(self.every_samples > 0, "checkpoint.every_samples", self.every_samples, "at least 1")
        _require(self.keep is None or self.keep > 0, "checkpoint.keep", self.keep, "at least 1, or none to keep all")


@dataclass(frozen=True)
class LoggingConfig:
    """What the run tells while it trains."""

    every_steps: int = 10
    """optimizer steps between lines of metrics.jsonl and of the progress display"""

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, "logging.every_steps", self.every_steps, "at least 1")


@dataclass(frozen=True)
class SamplingConfig:
    """DDIM with classifier-free guidance."""

    steps: int = 50
    """DDIM steps"""
    guidance_scale: float = 8.0
    """1 is no guidance"""

    def __post_init__(self) -> None:
        _require(self.steps > 0, "sampling.steps", self.steps, "at least 1")
        _require(self.guidance_scale >= 0, "sampling.guidance_scale", self.guidance_scale, "0 or more")


@dataclass(frozen=True)
class MLPerfConfig:
    """The MLPerf log of the run, `result_0.txt`."""

    division: Literal["none", "closed", "open"] = "none"
    """none: no log; closed: refuses values that the closed division's rules do not allow; open: takes any"""
    org: str = ""
    """submission_org"""
    platform: str = ""
    """submission_platform"""
    status: Literal["", "onprem", "cloud", "preview", "research"] = ""
    """submission_status"""
    caches_cleared: bool = False
    """that the system's file caches were dropped before this process started; logged as cache_clear"""


@dataclass(frozen=True)
class EvaluationConfig:
    """How `sd-perf evaluate` scores checkpoints."""

    prompts: str = ""
    """captions to draw: a .tsv with a column `caption` (the benchmark's), or a captions.jsonl"""
    num_prompts: int = 30_000
    """prompts drawn, from the top of the file"""
    batch_size: int = 32
    """pictures drawn at a time"""
    autoencoder: str = ""
    """file of the decoder: .onnx, .ckpt or .safetensors"""
    features: str = ""
    """network whose features FID compares: the FID Inception (.pth), or a feature net (.safetensors)"""
    statistics: str = ""
    """.npz with mu and sigma of the real pictures' features"""
    clip_model: str = "ViT-H-14"
    """open_clip model of the CLIP score, or the path of a model JSON"""
    clip_weights: str = ""
    """file of its weights"""
    fid_target: float = 90.0
    """a run has converged at the first checkpoint with an FID of at most this ..."""
    clip_target: float = 0.15
    """... and a CLIP score of at least this"""
    judge: bool = False
    """also count the pictures that show their caption, as a program reads them (tiny world only)"""

    def __post_init__(self) -> None:
        _require(self.num_prompts > 1, "evaluation.num_prompts", self.num_prompts, "at least 2")
        _require(self.batch_size > 0, "evaluation.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """The run folder."""

    dir: str = "runs/default"
    """folder that receives manifest, metrics and checkpoints"""
    note: str = ""
    """what the run can and cannot show; printed under its last table"""


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mlperf: MLPerfConfig = field(default_factory=MLPerfConfig)

    def __post_init__(self) -> None:
        factor = self.model.downsampling
        _require(
            self.data.latent_size % factor == 0,
            "data.latent_size",
            self.data.latent_size,
            f"a multiple of {factor}, the factor between the UNet's first and last level",
        )
        needs_text = self.data.format == "moments" and self.data.context == "open_clip"
        _require(
            not needs_text or bool(self.text_encoder.weights),
            "text_encoder.weights",
            self.text_encoder.weights,
            'a file of weights (or "random"), since data.context is open_clip',
        )
        _require(
            self.sampling.steps <= self.diffusion.num_timesteps,
            "sampling.steps",
            self.sampling.steps,
            f"at most diffusion.num_timesteps ({self.diffusion.num_timesteps})",
        )

    @property
    def learning_rate(self) -> float:
        """Rate after warm-up: base rate x global batch."""
        return self.optimizer.base_learning_rate * self.training.global_batch_size

    def micro_batch_size(self, world_size: int) -> int:
        """Samples per rank and forward pass. Raises ConfigError where the global batch does not divide."""
        parts = world_size * self.training.accumulate_steps
        _require(
            self.training.global_batch_size % parts == 0,
            "training.global_batch_size",
            self.training.global_batch_size,
            f"a multiple of ranks x accumulate_steps = {world_size} x {self.training.accumulate_steps}",
        )
        return self.training.global_batch_size // parts

    def steps_of(self, samples: int) -> int:
        """Optimizer steps that cover so many samples: ceil(samples / global batch)."""
        return -(-samples // self.training.global_batch_size)
