"""Pictures of the same few prompts, from the same noise, at points of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sd_perf.config import Config
from sd_perf.evaluation.evaluate import GRID_COLUMNS, grid_path, write_grid
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.models.build import DTYPES, build_sampling_unet, build_text_encoder
from sd_perf.models.readers import read_decoder


class FixedPrompts:
    """Loads what drawing needs, once; `draw` then takes the weights of the moment.

    It has a UNet of its own. So the network that trains keeps its mode, its precision state (FP8
    histories move with every forward pass) and its CUDA graph, and the pictures are computed as
    `evaluate` computes them. That takes 4 bytes a parameter of the device's memory.

    Raises ConfigError where the config names no autoencoder or prompts, and DataError or
    CheckpointError for a file that cannot be used.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        options, wanted = config.evaluation, "since sampling.every_samples is set"
        right = f"the file of a decoder (.onnx, .ckpt, .safetensors), {wanted}"
        options.require(bool(options.autoencoder), "autoencoder", right)
        if not config.sampling.prompts:
            right = f"a file of captions, {wanted} and sampling.prompts are not"
            options.require(bool(options.prompts), "prompts", right)
        self.config = config
        few = min(GRID_COLUMNS, options.num_prompts)
        self.prompts = list(config.sampling.prompts) or read_prompts(Path(options.prompts), few)
        with torch.random.fork_rng():  # what the libraries draw is none of the training's
            dtype = DTYPES[options.precision]
            self._decode = read_decoder(Path(options.autoencoder), device, dtype)
            self._text_encoder = build_text_encoder(config, device)
            self._unet = build_sampling_unet(config, device)

    def draw(self, weights: Mapping[str, torch.Tensor], seed: int, samples: int) -> Path:
        """Write the grid of position `samples`; returns its path.

        `weights` are the network's by name, of any float dtype. CheckpointError where they give
        pictures that are not finite.
        """
        self._unet.load_state_dict(weights)
        folder = Path(self.config.run.dir) / "samples"
        drawn = generate(
            self._unet,
            self._text_encoder,
            self._decode,
            self.prompts,
            config=self.config,
            seed=seed,
            batch_size=min(len(self.prompts), self.config.evaluation.batch_size),
            source=f"{grid_path(folder, samples)}: the weights",
        )
        return write_grid(torch.cat(list(drawn)), self.prompts, folder, samples)
