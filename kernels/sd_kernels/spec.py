"""What there is to know of an op: its calls in the UNet, its inputs, its backends, its work.

Tests, benchmarks, `doctor` and parity iterate over these, so that adding an op is adding a folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sd_kernels.targets import Target

if TYPE_CHECKING:
    from sd_kernels.sd_v2_shapes import Architecture

Function = Callable[..., Any]
"""a differentiable function of tensors and options, all by keyword; gives a tensor or a tuple of
them"""


@dataclass(frozen=True)
class Case:
    """One kind of call: sizes by shape letter, options of the op, and how often one training step
    makes it."""

    name: str
    shape: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    """how inputs are drawn: `mean`, `std`, `padding` (elements skipped between rows: a view into a
    wider tensor)"""
    calls: int = 1

    def at_batch(self, batch: int) -> Case:
        """The same call with another batch size."""
        return replace(self, shape={**self.shape, "B": batch})


class Inputs:
    """Makes an op's input tensors: drawn from a seed, or left empty where only shapes and addresses
    matter."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        empty: bool = False,
    ) -> None:
        self.case = case
        self.dtype = dtype
        self.device = device
        self.empty = empty
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0, std: float = 1.0
    ) -> torch.Tensor:
        """Normal numbers that take gradients; rows of the last axis are adjacent unless the case
        says `padding`."""
        padding = self.case.data.get("padding", 0) if len(shape) > 1 else 0
        full = torch.empty(
            *shape[:-1], shape[-1] + padding, dtype=dtype or self.dtype, device=self.device
        )
        if not self.empty:
            full = full.copy_(
                torch.randn(full.shape, generator=self.generator, device=self.device) * std + mean
            )
        return full[..., : shape[-1]].requires_grad_()

    def data(self, *shape: int) -> torch.Tensor:
        """`tensor` with the mean and standard deviation that the case asks for."""
        return self.tensor(
            *shape, mean=self.case.data.get("mean", 0.0), std=self.case.data.get("std", 1.0)
        )

    def image(self, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
        """`data` of shape (B, C, H, W) in channels-last memory."""
        return (
            self.data(batch, height, width, channels).detach().permute(0, 3, 1, 2).requires_grad_()
        )

    def kernel(self, out_channels: int, in_channels: int, side: int) -> torch.Tensor:
        """Weights (O, I, side, side) of a convolution that keeps the variance, in channels-last
        memory."""
        weight = self.tensor(
            out_channels, side, side, in_channels, std=(in_channels * side**2) ** -0.5
        )
        return weight.detach().permute(0, 3, 1, 2).requires_grad_()

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        """Integers in [low, high)."""
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(
            low, high, shape, generator=self.generator, dtype=dtype, device=self.device
        )


def anything(case: Case, dtype: torch.dtype) -> str:
    """Refuse nothing."""
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a module of its folder with a function named after the op, or
    `attribute`."""

    name: str
    module: str
    attribute: str = ""
    """the function's name where a module holds several backends"""
    requires: str = ""
    """what must be importable besides, where the module imports it no sooner than it is called"""
    package: str = ""
    """the package it adapts, with the version whose signature its test binds; empty: none beside
    torch and triton"""
    install: str = ""
    """how to get that package"""
    capability: tuple[int, int] = (0, 0)
    """least compute capability; (0, 0) runs on a CPU too"""
    majors: tuple[int, ...] = ()
    """the only major versions of compute capability it is built for; empty: all"""
    gpu_dtypes: tuple[torch.dtype, ...] = ()
    """the only dtypes that it takes on a GPU; empty: all that the op takes"""
    refuses: Callable[[Case, torch.dtype], str] = anything
    """why it cannot compute a case, or an empty string"""
    automatic: bool = True
    """whether `auto` may choose it"""
    exact: bool = True
    """whether the outputs that the spec calls exact must be so; otherwise they follow the rule of
    all others"""

    def unfit(self, target: Target) -> str:
        """Why this backend is not for such hardware, or an empty string."""
        if (
            self.capability > (0, 0)
            and target.device != "cuda"
            and not (self.name == "triton" and target.interpreted)
        ):
            return f"needs a CUDA GPU, this is {target.name}"
        if target.device == "cuda" and self.capability > target.capability:
            return "needs compute capability {}.{}, ".format(
                *self.capability
            ) + "{} has {}.{}".format(target.name, *target.capability)
        if target.device == "cuda" and self.majors and target.capability[0] not in self.majors:
            majors = " or ".join(f"{major}.x" for major in self.majors)
            return "needs compute capability {}, {} has {}.{}".format(
                majors, target.name, *target.capability
            )
        return ""

    def missing(self, target: Target) -> str:
        """Why this backend cannot be had on the target, or an empty string."""
        if unfit := self.unfit(target):
            return unfit
        try:
            importlib.import_module(self.requires or self.module)
        except ImportError as error:
            return f"{error}; {self.install}" if self.install else str(error)
        return ""

    def function(self, op: str) -> Function:
        """The op's implementation; ImportError where its package is absent."""
        return getattr(importlib.import_module(self.module), self.attribute or op)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrices, and the bytes that must move: inputs read once,
    outputs written once."""

    flops: float
    """of the forward"""
    forward_bytes: float
    backward_bytes: float
    backward_flops: float = 0.0
    """with what is computed again; 0 stands for twice the forward's"""


@dataclass(frozen=True)
class OpSpec:
    """An op. Backends are in the order in which `auto` prefers them; the last is the reference."""

    name: str
    summary: str
    backends: tuple[Backend, ...]
    cases: tuple[Case, ...]
    """every kind of call that one training step of the benchmark's UNet makes, at batch 64"""
    small_cases: tuple[Case, ...]
    """small and ragged ones for the interpreter; the first is tiny enough for a numerical
    gradient"""
    inputs: Callable[[Case, Inputs], dict[str, Any]]
    work: Callable[[Case, torch.dtype], Work]
    cases_of: Callable[[Architecture], tuple[Case, ...]] | None = None
    """the same of a UNet of other sizes; None: no op of a step in bfloat16"""
    outputs: tuple[str, ...] = ("y",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    exact: tuple[str, ...] = ()
    """outputs that must equal the reference's bit for bit"""
    differentiable: bool = True
    in_place: bool = False
    """whether it writes into its inputs and gives them back"""

    def backend(self, name: str) -> Backend:
        """The backend of that name; StopIteration where there is none."""
        return next(backend for backend in self.backends if backend.name == name)

    def reference(self) -> Function:
        """The plain torch implementation."""
        return self.backends[-1].function(self.name)
