"""Sections `training` and `optimizer`: length, batch, arithmetic and update of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sd_perf.config.rules import (
    SEED,
    Count,
    Decay,
    NotNegative,
    Positive,
    Rule,
    Samples,
    Section,
    StepsOrNone,
    at_most,
)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW over every parameter, and the learning-rate schedule."""

    section = "optimizer"

    base_learning_rate: Positive = 1.25e-7
    """learning rate per sample: the full rate is this x training.global_batch_size"""
    warmup_steps: StepsOrNone = 1000
    """optimizer steps of linear warm-up to the full rate"""
    warmup_start: Annotated[float, Rule(lambda part: 0 <= part <= 1, "between 0 and 1")] = 1e-6
    """fraction of the full rate at the first step"""
    decay_steps: StepsOrNone = 0
    """optimizer steps after warm-up in which the rate falls; 0: it stays constant"""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """how the rate falls: along a line, or along half a period of the cosine"""
    decay_end: Annotated[float, Rule(lambda part: 0 < part <= 1, "positive and at most 1")] = 0.01
    """fraction of the full rate that is left after decay_steps, and then kept"""
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
    max_samples: Samples = 5_120_000
    """length of the run, samples (rounded up to whole steps)"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32 everywhere; bf16: weights with fp32 masters in the fast network, autocast over fp32
    weights in the plain one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one and says what it took"""
    cpu_threads: Annotated[
        int | None, Rule(lambda threads: threads > 0, "at least 1, or none"), at_most(1024)
    ] = None
    """threads of CPU arithmetic per process; none: the run's so far, at first torch's choice"""
    seed: Annotated[int | None, SEED] = None
    """seed of weights, data order and every draw; none: random, kept in the manifest"""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: where there is a GPU, the fast network's iteration is one CUDA graph; off: its kernels
    are launched one by one, which is slower"""
    strategy: Literal["auto", "ddp", "zero1"] = "auto"
    """of several ranks with the fast network; ddp: each updates all weights; zero1: each updates
    a share and keeps only that share's moments; auto: zero1, but ddp with model.compile"""
    min_snr_gamma: NotNegative = 0.0
    """weigh each sample's loss by its timestep, min-SNR with this gamma (usual: 5); 0: all alike"""
    ema_decay: Decay = 0.0
    """decay of the moving average of the weights that checkpoints keep beside them; it grows to
    this as 1 - steps^(-2/3); 0: no average"""
    deterministic: bool = False
    """deterministic GPU algorithms and kernels, slower (CPU runs always are)"""
