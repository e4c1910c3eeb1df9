"""What the trainer asks of a training step, whichever network it trains.

`plain_step` and `fast_step` have the two kinds; `build_step` chooses.

Shape letters: B samples, C latent channels, S latent rows and columns, T text tokens, D context
channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Replacement
from sd_perf.distributed.world import World
from sd_perf.models.build import ImageEncoder, TextEncoder
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.training.learning_rate import learning_rate

State = dict[str, Any]
"""tensors by checkpoint name, or `runs.checkpoint_files.Piece` where a rank has but a part"""


class TrainStep(ABC):
    """`step(batches, step_index)`: one optimizer step on this rank; owns weights and optimizer."""

    divides_state = False
    """whether each rank holds a part of the state, so that all must write checkpoints"""

    def __init__(
        self,
        unet: torch.nn.Module,
        config: Config,
        world: World,
        text_encoder: TextEncoder | None,
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        self.unet, self.config, self.world = unet, config, world
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        ema = ("ema",) if config.training.ema_decay else ()
        self.components = ("model", "exp_avg", "exp_avg_sq", *ema)

    @abstractmethod
    def __call__(
        self, batches: Iterator[Batch], step_index: int
    ) -> tuple[torch.Tensor, list[Replacement]]:
        """Take one step, counted from 0; returns the loss and the bad samples that were replaced.

        The loss is the mean over the rank's samples, a detached float32 scalar on the device, which
        the next step may overwrite.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Do once what the first step would: compile kernels, tune convolutions, capture a graph.

        Runs on synthetic samples, and leaves weights, moments and precision state bit-identical.
        Where nothing of the kind is to be done it does nothing.
        """

    @abstractmethod
    def buffers(self) -> dict[str, torch.Tensor]:
        """The tensors that hold weights and moments, as they lie on the device; not copied."""

    @abstractmethod
    def named(self, buffers: Mapping[str, torch.Tensor]) -> State:
        """Float32 weights and moments of every parameter, from what `buffers` gave or copies of it.

        Their names are `<component>.<name>`, of the components in `components`.
        """

    def state(self) -> State:
        """`named`, of the buffers themselves."""
        return self.named(self.buffers())

    @abstractmethod
    def gather_weights(self) -> None:
        """Make the network's weights whole on this rank, where ranks update parts of them."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the device holds beside tensors."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Continue after `steps` steps from whole tensors, by the names that `state_shapes` has."""

    def state_shapes(self) -> dict[str, torch.Tensor]:
        """Whole tensors of the state by checkpoint name, without data (device "meta")."""
        return {
            f"{component}.{name}": torch.empty_like(
                parameter, dtype=torch.float32, device="meta", memory_format=torch.preserve_format
            )
            for component in self.components
            for name, parameter in self.unet.named_parameters()
        }

    def learning_rate(self, step_index: int) -> float:
        """Rate of a step, counted from 0."""
        return learning_rate(self.config.optimizer, self.config.learning_rate, step_index)

    def context(self, batch: Batch) -> torch.Tensor:
        """The text states (B, T, D) of a batch; encoded here where the loader has captions only."""
        if batch.context is not None:
            return batch.context
        return self.encode(batch.captions)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """The text states (B, T, D) of B captions."""
        if self.text_encoder is None:
            raise ValueError("the batch holds captions only: the step needs a text encoder")
        with self._autocast():
            return self.text_encoder(captions)

    def moments(self, batch: Batch) -> torch.Tensor:
        """The moments (B, 2C, S, S) of a batch; encoded here where the loader has pictures only."""
        if batch.moments is not None:
            return batch.moments
        if batch.pixels is None or self.image_encoder is None:
            raise ValueError("the batch holds pictures only: the step needs an image encoder")
        pixels = batch.pixels.to(self.world.device, non_blocking=True)
        with self._autocast():
            return self.image_encoder(pixels).float()

    def _autocast(self) -> torch.autocast:
        """The arithmetic of frozen networks, as in the benchmark's step."""
        is_bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_bf16)

    def rehearse_encoders(self) -> None:
        """Encode a batch of empty captions and black pictures, where the step encodes such."""
        size = self.config.micro_batch_size(self.world.size)
        if self.text_encoder is not None:
            self.encode([""] * size)
        if self.image_encoder is not None:
            side = PIXELS_PER_LATENT * self.config.data.latent_size
            pixels = torch.zeros(size, 3, side, side)
            self.moments(Batch(torch.arange(size), None, [], pixels=pixels))
