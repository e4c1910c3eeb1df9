"""A training iteration as repeatable GPU work, eager or captured in one CUDA graph; the plain one.

Shape letters: B samples, C latent channels, S latent rows and columns, L text tokens, D context
channels.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd_perf.config import Config, DiffusionConfig, UNetConfig
from sd_perf.data.loaders.synthetic import draw_inputs
from sd_perf.fast.graph import capture
from sd_perf.models.key_maps import diffusers_unet_config
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.reference.step import DiffusionStep
from sd_perf.reference.unet import UNet
from sd_perf.training.optimizer import build_optimizer


class DiffusersUNet(torch.nn.Module):
    """diffusers' UNet of this config, with the arguments and the result of `UNet`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        define_missing_torchvision_ops()
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.model = UNet2DConditionModel.from_config(diffusers_unet_config(config))
        for module in self.model.modules():
            # Stock diffusers has one number of groups for all norms.
            if isinstance(module, Transformer2DModel):
                module.norm.num_groups = config.transformer_groups

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        return self.model(latents, timesteps, context, return_dict=False)[0]


@dataclass(frozen=True)
class Recipe:
    """One way to run a UNet: what a row calls `implementation` and `precision`."""

    implementation: str
    """name in the rows"""
    precision: str
    """where each number format is used, in words"""
    weights: torch.dtype
    """dtype of the parameters that forward and backward read"""
    autocast: bool = False
    """whether torch.autocast casts to bfloat16, layer by layer"""
    attention: SDPBackend | None = None
    """the only kernel that torch's attention may use; None: the network chooses"""
    network: Callable[[UNetConfig], torch.nn.Module] = UNet
    """makes the UNet"""
    compiled: bool = False
    """whether torch.compile compiles it"""
    requires: str = ""
    """package without which this cannot run, beside torch, Triton and NumPy"""
    estimated_as: str = ""
    """the recipe of `sd-perf estimate` that predicts this one; empty: none does"""

    def unet(self, config: UNetConfig, device: str) -> torch.nn.Module:
        """The network with float32 parameters, those of convolutions in channels-last memory."""
        with torch.device(device):
            return channels_last(self.network(config))

    def workload(self, config: UNetConfig, batch: int, device: str, **sizes: int) -> Workload:
        """Training iterations of this recipe; `sizes` as `Workload` has them."""
        return PlainWorkload(self, config, batch, device, **sizes)


FP32 = Recipe("plain_fp32", "fp32, TF32 off", torch.float32, attention=SDPBackend.MATH)
AUTOCAST = Recipe(
    "plain_autocast",
    "fp32 parameters under bf16 autocast; norms and losses fp32",
    torch.float32,
    autocast=True,
    attention=SDPBackend.CUDNN_ATTENTION,
    estimated_as="plain",
)
MASTERS = Recipe(
    "plain_bf16_masters",
    "bf16 weights and activations; AdamW on fp32 masters, from which the bf16 weights are rounded "
    "after every step",
    torch.bfloat16,
    attention=SDPBackend.CUDNN_ATTENTION,
)
COMPILED = replace(MASTERS, implementation="plain_bf16_masters_compiled", compiled=True)
DIFFUSERS = replace(
    MASTERS,
    implementation="diffusers_bf16_masters",
    network=DiffusersUNet,
    requires="diffusers",
    attention=None,
)
DIFFUSERS_COMPILED = replace(
    DIFFUSERS, implementation="diffusers_bf16_masters_compiled", compiled=True
)


class Predictor(torch.nn.Module):
    """A UNet run by a recipe: takes the inputs of `UNet` in any precision."""

    def __init__(self, unet: torch.nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.unet = unet
        self.recipe = recipe
        self.dtype = next(unet.parameters()).dtype

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        # Every weight is used once per iteration, so autocast's cache of casts saves nothing;
        # without it no cast can outlive the capture it was made in.
        autocast = torch.autocast(
            latents.device.type, torch.bfloat16, enabled=self.recipe.autocast, cache_enabled=False
        )
        attention = self.recipe.attention
        if attention == SDPBackend.CUDNN_ATTENTION and not latents.is_cuda:
            attention = SDPBackend.MATH  # in a rehearsal on a CPU, which has no cuDNN
        with autocast, sdpa_kernel(attention) if attention else contextlib.nullcontext():
            return self.unet(latents, timesteps, context.to(self.dtype))


def channels_last(unet: torch.nn.Module) -> Any:
    """The UNet itself, with its convolution weights as NHWC, the layout the tensor cores read."""
    return unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of all parameters that have one; the tensors themselves."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def copy_all(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    """Copy each source into its target, in few launches; formats may differ."""
    torch._foreach_copy_(list(targets), list(sources))


def randomize(unet: torch.nn.Module, seed: int) -> None:
    """Torch's default initialization of every layer, in place, by seed and device.

    Training starts some layers at 0. Checks and timings do not: most gradients would be 0, and work
    on zeros can run faster than real work.
    """
    torch.manual_seed(seed)
    for module in unet.modules():
        if isinstance(
            module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm | torch.nn.LayerNorm
        ):
            module.reset_parameters()


class Workload(ABC):
    """Training iterations over one batch of inputs that stays in device memory; no loader.

    `iteration()` draws latents, noise and timesteps by the sample indices, runs forward, backward
    and AdamW, and advances the indices by B. It never waits for the device, so that it can be
    captured. Everything that it changes is in `state()`, and `reset()` restores the start state bit
    for bit. The abstract methods are what differs between recipes.
    """

    unet: torch.nn.Module
    """the network whose parameters forward and backward read"""
    kernels: Mapping[str, str] = {}
    """backend of each operator of sd_kernels that iterations have called"""

    def __init__(
        self,
        config: UNetConfig,
        batch: int,
        device: str,
        latent_size: int = 64,
        context_tokens: int = 77,
        seed: int = 0,
    ) -> None:
        """Inputs are moments (B, 2C, S, S), S = latent_size, and context (B, L, D)."""
        self.config, self.batch, self.device, self.seed = config, batch, device, seed
        self.sample_indices = torch.arange(batch, device=device)
        self.loss = torch.zeros((), device=device)
        self.moments, self.context = make_inputs(
            config, self.sample_indices, latent_size, context_tokens, seed
        )
        self.diffusion = DiffusionStep(DiffusionConfig(), seed).to(device)

    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """The float32 weights that AdamW updates, by parameter; may be copies."""

    @abstractmethod
    def iteration(self) -> None:
        """One optimizer step; leaves the batch's mean loss in `loss`, a float32 scalar."""

    @abstractmethod
    def capture(self) -> Callable[[], None]:
        """Capture the iteration as one CUDA graph, and return what replays it.

        The state stays as it is. On a CPU what is returned is the iteration itself.
        """

    @abstractmethod
    def restart(self) -> None:
        """Weights of the seed; moments and step count 0."""

    @abstractmethod
    def changing(self) -> list[torch.Tensor]:
        """The tensors that the iteration changes and the next one reads, sample indices aside."""

    @torch.no_grad()
    def reset(self) -> None:
        """Restore the start state: `restart`, and sample indices 0 to B - 1."""
        self.restart()
        torch.arange(self.batch, out=self.sample_indices)
        self.loss.zero_()

    def state(self) -> list[torch.Tensor]:
        """Every tensor that an iteration changes and the next one reads; the tensors themselves."""
        return [*self.changing(), self.sample_indices]


class PlainWorkload(Workload):
    """The plain diffusion step and torch's fused AdamW around a UNet of plain layers."""

    def __init__(
        self, recipe: Recipe, config: UNetConfig, batch: int, device: str, **sizes: int
    ) -> None:
        super().__init__(config, batch, device, **sizes)
        self.master_unet = recipe.unet(config, device)
        self.unet = self.master_unet
        if recipe.weights != torch.float32:
            self.unet = copy.deepcopy(self.master_unet).to(recipe.weights)
            # The gradients of `unet` are cast into these.
            for parameter in self.master_unet.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.predictor = Predictor(self.unet, recipe)
        self.optimizer = build_optimizer(self.master_unet, Config())
        # A number would be frozen into the graph; a tensor is read at every replay.
        self.optimizer.param_groups[0]["lr"] = torch.tensor(Config().learning_rate, device=device)
        if recipe.compiled:
            self.unet.compile(dynamic=False)
        self.reset()

    def capture(self) -> Callable[[], None]:
        # The fused step never asks the host for anything, but torch wants to be told before it lets
        # it be captured.
        self.optimizer.param_groups[0]["capturable"] = True
        self.unet.zero_grad(set_to_none=True)
        return capture(self.iteration).replay if self.device == "cuda" else self.iteration

    def iteration(self) -> None:
        # Gradients that start from None are written once, not zeroed and then added to. In a
        # capture they are born in the graph's own memory and stay there.
        self.unet.zero_grad(set_to_none=True)
        loss = self.diffusion(self.predictor, self.moments, self.context, self.sample_indices)
        loss.backward()
        with torch.no_grad():
            self._update()
            self.sample_indices += self.batch
            self.loss.copy_(loss.detach())

    def masters(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.master_unet.parameters()]

    def _update(self) -> None:
        """One AdamW step from the gradients of `unet`."""
        if self.unet is self.master_unet:
            self.optimizer.step()
            return
        copy_all(gradients(self.unet), gradients(self.master_unet))
        self.optimizer.step()
        copy_all(self.master_unet.parameters(), self.unet.parameters())

    def restart(self) -> None:
        randomize(self.master_unet, self.seed)
        if self.unet is not self.master_unet:
            copy_all(self.master_unet.parameters(), self.unet.parameters())
        for tensors in self.optimizer.state.values():
            torch._foreach_zero_(list(tensors.values()))

    def changing(self) -> list[torch.Tensor]:
        moments = [
            tensor for tensors in self.optimizer.state.values() for tensor in tensors.values()
        ]
        return [*self.master_unet.parameters(), *self.unet.parameters(), *moments]


def make_inputs(
    config: UNetConfig, samples: torch.Tensor, latent_size: int, context_tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (B, 2C, S, S) and context (B, L, D) of samples (B,), by the synthetic loader."""
    latents = (config.in_channels, latent_size, latent_size)
    return draw_inputs(seed, samples, latents, (context_tokens, config.context_dim))
