"""The exponential moving average of the weights, `training.ema_decay`.

After each optimizer step: average = decay average + (1 - decay) weights, in float32. The decay
grows with the steps (`decay_of_step`), so that the first weights are soon forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_kernels.average import average_weights
from sd_perf.training.flat import ALIGNMENT, Bucket, FlatParameters

POWER = 2 / 3
"""of the warm-up: with it the decay is 0.999 after 31,600 steps and 0.9999 after a million"""


def decay_of_step(limit: float, step: int) -> float:
    """The decay with which optimizer step `step`, counted from 0, enters the average.

    min(limit, 1 - (1 + step)^(-2/3)): the power warm-up of Crowson's k-diffusion (`EMAWarmup` with
    inv_gamma 1) and of diffusers (`EMAModel` with use_ema_warmup and its default power). The first
    step's decay is 0, so that the average begins as the weights after that step.
    """
    return min(limit, 1.0 - (1.0 + step) ** -POWER)


class PlainEma:
    """The average of a network's float32 parameters, each with a tensor of its own."""

    def __init__(self, unet: torch.nn.Module, limit: float) -> None:
        self.limit = limit
        self._weights = {name: weight.detach() for name, weight in unet.named_parameters()}
        self._averages = {name: torch.zeros_like(own) for name, own in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        rate = 1.0 - decay_of_step(self.limit, step)
        torch._foreach_lerp_([*self._averages.values()], [*self._weights.values()], rate)

    def tensors(self) -> dict[str, Tensor]:
        """The averages as `ema.<name>`, not copied."""
        return {f"ema.{name}": average for name, average in self._averages.items()}


class FlatEma:
    """The average of this rank's masters: a buffer (M,) beside those of `FlatAdamW`.

    `rate`, 1 - decay, is a tensor on the device, which is filled before each iteration.
    """

    def __init__(self, parameters: FlatParameters, limit: float) -> None:
        self.parameters, self.limit = parameters, limit
        self.average = parameters.local_buffer(torch.float32)
        self.rate = torch.ones((), dtype=torch.float32, device=self.average.device)

    def begin(self, step: int) -> None:
        """Set the rate of optimizer step `step`, counted from 0."""
        self.rate.fill_(1.0 - decay_of_step(self.limit, step))

    def update(self, bucket: Bucket) -> None:
        """Take in this rank's share of a bucket, after its update: one launch."""
        flat, local = self.parameters, bucket.local
        remainders = None if flat.remainders is None else flat.remainders[local]
        average_weights(self.average[local], flat.weights[bucket.share], remainders, self.rate)

    def try_on_scratch(self) -> None:
        """One update of small copies: see `FlatAdamW.try_on_scratch`."""
        flat, part = self.parameters, slice(0, 16 * ALIGNMENT)
        remainders = None if flat.remainders is None else flat.remainders[part]
        weights = flat.weights[: len(self.average[part])]
        average_weights(self.average[part].clone(), weights, remainders, self.rate)
