"""The configuration tree: what every field means, its unit, and the rules it must obey.

Presets are YAML files read by `sd_perf.presets`; this file needs the standard library alone, so
that the model and the step can be imported where nothing but torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

from sd_kernels import op_help, op_names
from sd_perf.errors import ConfigError


class Rule(NamedTuple):
    """What a field's value must be, unless it is None; stands in the field's type."""

    holds: Callable[[Any], bool]
    right: str
    """what would be, in words"""


Count = Annotated[int, Rule(lambda value: value > 0, "at least 1")]
Positive = Annotated[float, Rule(lambda value: value > 0, "positive")]
NotNegative = Annotated[float, Rule(lambda value: value >= 0, "0 or more")]
Decay = Annotated[float, Rule(lambda value: 0 <= value < 1, "in [0, 1)")]


class Section:
    """A part of the tree, whose fields obey the rules in their types."""

    section = ""
    """its name in the tree"""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for rule in getattr(hint, "__metadata__", ()):
                self.require(value is None or rule.holds(value), name, rule.right)

    def require(self, ok: bool, name: str, right: str) -> None:
        """ConfigError with the field's key, its value and what would be right, unless it is ok."""
        if not ok:
            raise ConfigError(
                f"{self.section}.{name}: {getattr(self, name)!r} cannot be used; it must be {right}"
            )


@dataclass(frozen=True)
class UNetConfig(Section):
    """The denoising UNet. Defaults are the benchmark's 865,910,724-parameter network."""

    section = "model"

    in_channels: Count = 4
    """channels of the latents"""
    out_channels: Count = 4
    """channels of the prediction"""
    model_channels: Annotated[Count, Rule(lambda channels: channels % 2 == 0, "even")] = 320
    """channels of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """channels of each level, in units of model_channels"""
    num_res_blocks: Count = 2
    """ResBlocks per level on the way down (one more on the way up)"""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """down-sampling factors of the levels that have transformers"""
    num_head_channels: Count = 64
    """channels per attention head"""
    context_dim: Count = 1024
    """channels of the text states"""
    resblock_groups: Count = 16
    """GroupNorm groups in ResBlocks and the head (the benchmark has 16, published SD v2 has 32)"""
    transformer_groups: Count = 32
    """GroupNorm groups at the entrance of each transformer"""
    implementation: Literal["plain", "fast"] = "plain"
    """plain: plain torch; fast: the same function of the operators that the section `kernels`
    chooses"""
    activation_checkpointing: bool = False
    """keep only what passes between blocks, and compute each block again in the backward pass (fast
    only)"""
    compile: bool = False
    """torch.compile of what lies between the operators, the whole forward pass as one graph (fast
    only)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_checkpointing", "compile"):
            right = f"false, since model.implementation is {self.implementation!r}"
            self.require(self.implementation == "fast" or not getattr(self, name), name, right)
        positive = bool(self.channel_mult) and min(self.channel_mult) > 0
        self.require(positive, "channel_mult", "one positive multiple per level")
        factors = tuple(2**level for level in range(len(self.channel_mult)))
        drawn = set(self.attention_resolutions) <= set(factors)
        self.require(drawn, "attention_resolutions", f"drawn from the levels' factors {factors}")
        for channels in (mult * self.model_channels for mult in self.channel_mult):
            for name in ("num_head_channels", "resblock_groups", "transformer_groups"):
                right = f"a divisor of every level's channels (here {channels})"
                self.require(channels % getattr(self, name) == 0, name, right)

    @property
    def network(self) -> UNetConfig:
        """The same network in its plain implementation."""
        return replace(self, **{name: getattr(UNetConfig, name) for name in SPEED_ONLY})

    @property
    def transformer_channels(self) -> tuple[int, ...]:
        """Channels of each level that has transformers; the middle, of the last level's channels,
        always has one."""
        last = len(self.channel_mult) - 1
        levels = [
            level
            for level in range(last + 1)
            if level == last or 2**level in self.attention_resolutions
        ]
        return tuple(self.channel_mult[level] * self.model_channels for level in levels)

    @property
    def downsampling(self) -> int:
        """Factor between the latents and the UNet's smallest level; latent sides must be multiples
        of it."""
        return 2 ** (len(self.channel_mult) - 1)


SPEED_ONLY = ("implementation", "activation_checkpointing", "compile")
"""fields of UNetConfig that change how fast the network is computed, not what"""


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """The noise schedule (LDM's "linear", diffusers' "scaled_linear") and the scale of the
    latents."""

    section = "diffusion"

    num_timesteps: Count = 1000
    """timesteps of the forward process"""
    beta_start: float = 0.00085
    """first variance step"""
    beta_end: float = 0.0120
    """last variance step"""
    latent_scale: Positive = 0.18215
    """latents = latent_scale x a sample of the autoencoder's moments"""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_order = 0 < self.beta_start <= self.beta_end < 1
        self.require(in_order, "beta_start", f"positive and at most beta_end ({self.beta_end})")


@dataclass(frozen=True)
class DataConfig(Section):
    """Where samples come from."""

    section = "data"

    format: Literal["moments", "synthetic"] = "moments"
    """moments: the benchmark's tar shards; synthetic: drawn from the seed, no files"""
    path: str = ""
    """folder of the *.tar shards"""
    index: str = ""
    """file that keeps the byte offsets of every sample (default: sd_perf_index.npz in the shards'
    folder)"""
    latent_size: Count = 64
    """height and width of the latents, latent pixels"""
    context: Literal["precomputed", "open_clip"] = "open_clip"
    """text states: read from <key>.context.npy in the shards, or made from captions in every
    step"""
    context_tokens: Count = 77
    """text tokens per caption"""
    workers: Count = 4
    """threads that read and decode"""
    prefetch_batches: Count = 4
    """micro-batches made ready ahead of the step"""
    max_bad_samples: Annotated[int, Rule(lambda samples: samples >= 0, "0 or more")] = 0
    """samples that may be replaced by their successor before the run stops, summed over ranks"""
    allow_empty_captions: bool = False
    """take samples whose caption is empty, as the benchmark does"""
    max_caption_bytes: Count = 4096
    """longest caption taken, bytes of UTF-8"""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = "the folder of the moments shards (or set data.format to synthetic)"
        self.require(self.format == "synthetic" or bool(self.path), "path", right)


@dataclass(frozen=True)
class TextEncoderConfig(Section):
    """The frozen OpenCLIP text tower, used when data.context is open_clip and for sampling."""

    section = "text_encoder"

    model: str = "ViT-H-14"
    """open_clip model name, or the path of an open_clip model JSON"""
    weights: str = ""
    """file of weights (open_clip .bin/.pt/.safetensors, or an LDM .ckpt), or "random" for seeded
    random ones"""


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW over every parameter, and the learning-rate schedule."""

    section = "optimizer"

    base_learning_rate: Positive = 1.25e-7
    """learning rate per sample: the rate after warm-up is this x training.global_batch_size"""
    warmup_steps: Annotated[int, Rule(lambda steps: steps >= 0, "0 or more")] = 1000
    """optimizer steps of linear warm-up, from warmup_start x the full rate"""
    warmup_start: Annotated[float, Rule(lambda part: 0 <= part <= 1, "between 0 and 1")] = 1e-6
    """fraction of the full rate at the first step"""
    beta_1: Decay = 0.9
    """decay of the first moment"""
    beta_2: Decay = 0.999
    """decay of the second moment"""
    epsilon: Positive = 1e-8
    """added to the root of the second moment"""
    weight_decay: NotNegative = 0.01
    """decoupled weight decay, on every parameter"""


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Length, batch and arithmetic of the run."""

    section = "training"

    global_batch_size: Count = 512
    """samples per optimizer step, over all ranks and accumulation steps"""
    accumulate_steps: Count = 1
    """micro-batches per optimizer step on each rank"""
    max_samples: Count = 5_120_000
    """length of the run, samples (rounded up to whole steps)"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32 everywhere, or bf16 autocast over fp32 weights"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one and says what it took"""
    cpu_threads: Annotated[int | None, Rule(lambda threads: threads > 0, "at least 1, or none")] = (
        None
    )
    """threads of CPU arithmetic per process; none: as many as torch likes"""
    seed: Annotated[int | None, Rule(lambda seed: 0 <= seed < 2**63, "in [0, 2**63)")] = None
    """seed of weights, data order and every draw; none: drawn from system entropy and kept in the
    manifest"""
    deterministic: bool = False
    """deterministic GPU algorithms, slower (CPU runs always are)"""


Arithmetic = Literal["bf16", "fp8_te", "fp8_native"]


@dataclass(frozen=True)
class PrecisionConfig(Section):
    """Number formats of the linear layers in the fast UNet's transformers; those of the time stay
    as they are."""

    section = "precision"

    linear: Arithmetic = "bf16"
    """bf16: as training.precision says; fp8_native: operands in FP8, by the op fp8_linear of the
    section `kernels`; fp8_te: in FP8, by layers of Transformer Engine"""
    attention: Arithmetic | None = None
    """queries, keys, values and outputs of the attentions, but for the text's; none: as
    precision.linear"""
    feed_forward: Arithmetic | None = None
    """both layers of the feed-forwards; none: as precision.linear"""
    transformer_ends: Arithmetic | None = None
    """entrance and exit of each transformer; none: as precision.linear"""
    text: Arithmetic | None = None
    """keys and values of the text; none: as precision.linear"""
    fp8_recipe: Literal["current", "delayed"] = "current"
    """scales of fp8_te: from the numbers themselves, or from those of earlier steps (kept in
    checkpoints)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = "current, since no layer is fp8_te"
        self.require(self.fp8_recipe == "current" or self.uses("fp8_te"), "fp8_recipe", right)

    def of(self, layers: str) -> Arithmetic:
        """The arithmetic of a class of layers."""
        return getattr(self, layers) or self.linear

    def in_fp8(self) -> Iterator[tuple[str, str, str]]:
        """(class of layers, arithmetic, the key that says so) of each class in FP8."""
        for layers in LINEAR_LAYERS:
            if self.of(layers) != "bf16":
                yield layers, self.of(layers), layers if getattr(self, layers) else "linear"

    def uses(self, arithmetic: str) -> bool:
        """Whether any class of layers has this arithmetic."""
        return any(self.of(layers) == arithmetic for layers in LINEAR_LAYERS)


LINEAR_LAYERS = tuple(
    f.name for f in fields(PrecisionConfig) if f.name not in ("linear", "fp8_recipe")
)
"""classes of linear layers whose arithmetic can be chosen"""


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When training state is written, and how much of it is kept."""

    section = "checkpoint"

    every_samples: Count = 512_000
    """distance between checkpoints, samples (rounded up to whole steps)"""
    keep: Annotated[int | None, Rule(lambda keep: keep > 0, "at least 1, or none to keep all")] = (
        None
    )
    """newest checkpoints kept; none keeps all"""


@dataclass(frozen=True)
class LoggingConfig(Section):
    """What the run tells while it trains."""

    section = "logging"

    every_steps: Count = 10
    """optimizer steps between lines of metrics.jsonl and of the progress display"""


@dataclass(frozen=True)
class SamplingConfig(Section):
    """DDIM with classifier-free guidance."""

    section = "sampling"

    steps: Count = 50
    """DDIM steps"""
    guidance_scale: NotNegative = 8.0
    """1 is no guidance"""


@dataclass(frozen=True)
class MLPerfConfig:
    """The MLPerf log of the run, `result_0.txt`."""

    division: Literal["none", "closed", "open"] = "none"
    """none: no log; closed: refuses values that the closed division's rules do not allow; open:
    takes any"""
    org: str = ""
    """submission_org"""
    platform: str = ""
    """submission_platform"""
    status: Literal["", "onprem", "cloud", "preview", "research"] = ""
    """submission_status"""
    parity_record: str = ""
    """parity.json that proves the fast network (default: in the folder <run.dir>.parity, as sd-perf
    parity writes)"""
    waive: tuple[Literal["parity"], ...] = ()
    """checks that the run starts without, by name; the log says so. parity: a green parity record
    for this config"""
    caches_cleared: bool = False
    """that the system's file caches were dropped before this process started; logged as
    cache_clear"""


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """How `sd-perf evaluate` scores checkpoints."""

    section = "evaluation"

    prompts: str = ""
    """captions to draw: a .tsv with a column `caption` (the benchmark's), or a captions.jsonl"""
    num_prompts: Annotated[int, Rule(lambda prompts: prompts > 1, "at least 2")] = 30_000
    """prompts drawn, from the top of the file"""
    batch_size: Count = 32
    """pictures drawn at a time"""
    autoencoder: str = ""
    """file of the decoder: .onnx, .ckpt or .safetensors"""
    features: str = ""
    """network whose features FID compares: the FID Inception (.pth), or a feature net
    (.safetensors)"""
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


def _with_ops(section: type) -> type:
    """The section with a field for each op of sd_kernels before its own: another op is no edit
    here."""
    names = op_names()
    section.__annotations__ = {**dict.fromkeys(names, "str"), **section.__annotations__}
    for name in names:
        setattr(section, name, "auto")
    # Help for the command line, which reads it where it finds no text below a field.
    helps = "".join(f"    {name}: {op_help(name)}\n" for name in names)
    section.__doc__ = f"{section.__doc__}\n\nAttributes:\n{helps}"
    return section


@dataclass(frozen=True)
@_with_ops
class KernelsConfig(Section):
    """Which implementation runs each operator: auto, or a backend that `sd-perf doctor` lists."""

    section = "kernels"

    strict: bool = False
    """make auto fail where it would pass over a faster backend"""

    if TYPE_CHECKING:  # the ops' fields

        def __init__(self, strict: bool = False, **backends: str) -> None: ...
        def __getattr__(self, op: str) -> str: ...


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
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mlperf: MLPerfConfig = field(default_factory=MLPerfConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        factor, size = self.model.downsampling, self.data.latent_size
        right = f"a multiple of {factor}, the factor between the UNet's first and last level"
        self.data.require(size % factor == 0, "latent_size", right)
        needs_text = self.data.format == "moments" and self.data.context == "open_clip"
        right = 'a file of weights (or "random"), since data.context is open_clip'
        self.text_encoder.require(
            not needs_text or bool(self.text_encoder.weights), "weights", right
        )
        timesteps = self.diffusion.num_timesteps
        right = f"at most diffusion.num_timesteps ({timesteps})"
        self.sampling.require(self.sampling.steps <= timesteps, "steps", right)
        self._require_fp8()

    def _require_fp8(self) -> None:
        """The rules between FP8 and the rest: who computes it, on top of what, at which widths,
        with what else."""
        model, training = self.model, self.training
        for layers, arithmetic, key in self.precision.in_fp8():
            right = (
                f"bf16, since model.implementation is {model.implementation!r}, which has no FP8"
            )
            self.precision.require(model.implementation == "fast", key, right)
            right = f"bf16, since training.precision is {training.precision!r}"
            self.precision.require(training.precision == "bf16", key, right)
            widths = (
                *model.transformer_channels,
                *([model.context_dim] if layers == "text" else []),
            )
            odd = next((width for width in widths if width % 16), None)
            right = (
                f"bf16, since FP8 takes multiples of 16 channels and {layers} has layers of {odd}"
            )
            self.precision.require(odd is None, key, right)
            if "te" in (arithmetic.removeprefix("fp8_"), self.kernels.fp8_linear):
                right = (
                    f"false with precision.{key} in Transformer Engine, which torch.compile "
                    "cannot trace"
                )
                model.require(not model.compile, "compile", right)
        again = model.activation_checkpointing and self.precision.fp8_recipe == "delayed"
        right = (
            "current with model.activation_checkpointing: computing again would enter magnitudes "
            "twice"
        )
        self.precision.require(not again, "fp8_recipe", right)

    @property
    def learning_rate(self) -> float:
        """Rate after warm-up: base rate x global batch."""
        return self.optimizer.base_learning_rate * self.training.global_batch_size

    def micro_batch_size(self, world_size: int) -> int:
        """Samples per rank and forward pass. Raises ConfigError where the global batch does not
        divide."""
        batch, parts = self.training.global_batch_size, world_size * self.training.accumulate_steps
        right = (
            f"a multiple of ranks x accumulate_steps = {world_size} x "
            f"{self.training.accumulate_steps}"
        )
        self.training.require(batch % parts == 0, "global_batch_size", right)
        return batch // parts

    def steps_of(self, samples: int) -> int:
        """Optimizer steps that cover so many samples: ceil(samples / global batch)."""
        return -(-samples // self.training.global_batch_size)
