"""Section `data`: where samples come from, how they are read, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sd_perf.config.rules import (
    ONE,
    Count,
    PathText,
    SamplesOrNone,
    Section,
    Side,
    Threads,
    at_most,
)


@dataclass(frozen=True)
class DataConfig(Section):
    """Where samples come from."""

    section = "data"

    format: Literal["moments", "synthetic"] = "moments"
    """moments: the benchmark's tar shards; synthetic: drawn from the seed, no files"""
    path: PathText = ""
    """folder of the *.tar shards"""
    index: PathText = ""
    """file of the samples' byte offsets (default: sd_perf_index.npz in data.path)"""
    latent_size: Side = 64
    """height and width of the latents, latent pixels"""
    context: Literal["precomputed", "open_clip"] = "open_clip"
    """text states: from <key>.context.npy in the shards, or from captions in every step"""
    context_tokens: Annotated[int, ONE, at_most(65_536)] = 77
    """text tokens per caption"""
    workers: Threads = 4
    """threads that read and decode"""
    prefetch_batches: Threads = 4
    """micro-batches made ready ahead of the step"""
    max_bad_samples: SamplesOrNone = 0
    """samples, over all ranks, that training may replace; images that data prepare may leave out"""
    allow_empty_captions: bool = False
    """take samples whose caption is empty, as the benchmark does"""
    max_caption_bytes: Count = 4096
    """longest caption taken, bytes of UTF-8"""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = "the folder of the moments shards (or set data.format to synthetic)"
        self.require(self.format == "synthetic" or bool(self.path), "path", right)
