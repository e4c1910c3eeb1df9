"""The inputs of the captured iteration, at addresses that never change.

Shape letters: B samples of a micro-batch, C latent channels, S latent rows and columns, T text
tokens, D context channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_perf.config import Config
from sd_perf.data.loaders.synthetic import draw_inputs
from sd_perf.distributed.world import World


@dataclass(frozen=True)
class Inputs:
    """What the iteration reads of one micro-batch."""

    sample_indices: Tensor
    """(B,) int64"""
    moments: Tensor
    """(B, 2C, S, S) float32"""
    context: Tensor
    """(B, T, D), in the dtype that the network computes in"""

    @classmethod
    def empty(
        cls,
        config: Config,
        world: World,
        context: torch.dtype,
        moments: torch.dtype = torch.float32,
    ) -> Inputs:
        """Zeros on the world's device, for this rank's micro-batch of the config."""
        B, side = config.micro_batch_size(world.size), config.data.latent_size
        text = config.data.context_tokens, config.model.context_dim
        return cls(
            torch.zeros(B, dtype=torch.int64, device=world.device),
            torch.zeros(
                B, 2 * config.model.in_channels, side, side, dtype=moments, device=world.device
            ),
            torch.zeros(B, *text, dtype=context, device=world.device),
        )

    def draw(self, config: Config, seed: int) -> None:
        """Fill with synthetic samples, for a rehearsal of the iteration."""
        side, text = config.data.latent_size, (config.data.context_tokens, config.model.context_dim)
        latents = config.model.in_channels, side, side
        self.sample_indices.copy_(torch.arange(len(self.sample_indices)))
        numbers = self.sample_indices
        moments, context = draw_inputs(seed, numbers, latents, text, config.diffusion.latent_scale)
        self.moments.copy_(moments)
        self.context.copy_(context)


class StaticBatches:
    """`inputs`, one for each micro-batch of a step, and the way there from the loader's batches.

    On a GPU a batch is copied from page-locked memory to a second set of buffers, on a stream of
    its own, while the iteration before still reads the first set; then, within the GPU, to those.
    """

    def __init__(self, config: Config, world: World) -> None:
        bf16 = config.training.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        count = config.training.accumulate_steps
        self.inputs = [Inputs.empty(config, world, dtype) for _ in range(count)]
        self._staged: list[_Staged] = []
        if world.device.type == "cuda":
            # Tensors arrive as the loader gives them and are cast on their way from the second set
            # to the first: torch casts a copy from the host before it leaves there.
            stream = torch.cuda.Stream()
            loaded = torch.float16 if config.data.format == "encoded" else torch.float32
            self._staged = [
                _Staged(Inputs.empty(config, world, loaded, loaded), stream) for _ in range(count)
            ]

    def fill(self, micro_step: int, given: Inputs) -> None:
        """Put a batch in place, cast where it is of other dtypes; returns at once on a GPU."""
        inputs = self.inputs[micro_step]
        if self._staged:
            self._staged[micro_step].pass_on(given, inputs)
        else:
            for name, tensor in vars(given).items():
                getattr(inputs, name).copy_(tensor)


class _Staged:
    """A second set of buffers and the events of its two copies."""

    def __init__(self, buffers: Inputs, stream: torch.cuda.Stream) -> None:
        self.buffers, self.stream = buffers, stream
        self.arrived, self.read = torch.cuda.Event(), torch.cuda.Event()

    def pass_on(self, given: Inputs, inputs: Inputs) -> None:
        """Copy from the host to `buffers` to `inputs`; the current stream waits for that alone.

        What is on the GPU already, such as text that was encoded there, needs no second buffer.
        """
        compute = torch.cuda.current_stream()
        self.stream.wait_event(self.read)
        with torch.cuda.stream(self.stream):
            for name, tensor in vars(given).items():
                if not tensor.is_cuda:
                    getattr(self.buffers, name).copy_(tensor, non_blocking=True)
            self.arrived.record()
        compute.wait_event(self.arrived)
        for name, tensor in vars(given).items():
            getattr(inputs, name).copy_(tensor if tensor.is_cuda else getattr(self.buffers, name))
        self.read.record(compute)
