"""Section `data`: where samples come from, how they are read, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sd_perf.config.rules import (
    ONE,
    Count,
    PathText,
    Rule,
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

    format: Literal["moments", "raw", "encoded", "synthetic"] = "moments"
    """moments: the benchmark's tar shards; raw: its tar shards of images, encoded in every step;
    encoded: compact shards of `data encode`; synthetic: drawn from the seed, no files"""
    path: PathText = ""
    """folder of the shards"""
    loader: Literal["portable", "dali"] = "portable"
    """portable: threads, any machine; dali: NVIDIA DALI, on a GPU if there is one (raw only)"""
    image_range: Literal["benchmark", "correct"] = "correct"
    """pixels given to the encoder; benchmark: [0, 1], as its moments were made; correct: [-1, 1]"""
    resume_in_another_format: bool = False
    """let a resumed run read another format of its data set: the same keys in the same order"""
    autoencoder: PathText = ""
    """file of the encoder, for raw: .ckpt or .safetensors, or .onnx"""
    index: PathText = ""
    """file of the samples' byte offsets (default: sd_perf_index.npz in data.path)"""
    latent_size: Side = 64
    """height and width of the latents, latent pixels"""
    context: Literal["precomputed", "open_clip"] = "open_clip"
    """text states: from the shards, or from captions in every step"""
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
    drop_captions: Annotated[float, Rule(lambda share: 0 <= share <= 1, "between 0 and 1")] = 0.0
    """share of samples, drawn anew in every epoch, whose caption is left out (usual: 0.1)"""
    random_flip: bool = False
    """exchange left and right of half of the pictures, drawn anew in every epoch (raw only)"""
    random_crop: bool = False
    """cut the square out anywhere along the longer side, drawn anew in every epoch (raw only)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        right = "the folder of the shards (or set data.format to synthetic)"
        self.require(self.format == "synthetic" or bool(self.path), "path", right)
        is_raw = self.format == "raw"
        right = "the file of the encoder, since data.format is raw"
        self.require(not is_raw or bool(self.autoencoder), "autoencoder", right)
        right = f"portable, since data.format is {self.format!r}: dali is for raw"
        self.require(is_raw or self.loader == "portable", "loader", right)
        right = "open_clip, since raw shards hold no text states; `data encode` makes such that do"
        self.require(not is_raw or self.context == "open_clip", "context", right)
        right = "0, since synthetic samples have no captions"
        self.require(self.format != "synthetic" or not self.drop_captions, "drop_captions", right)
        for name in ("random_flip", "random_crop"):
            right = f"false, since data.format is {self.format!r}, whose pictures are encoded"
            self.require(is_raw or not getattr(self, name), name, right)
