"""What an op says of itself: its calls in the UNet, its inputs, its backends, its work.

Tests, benchmarks, `doctor`, `estimate` and `parity` read the specs, so that adding an op is adding
a folder. GEGLU's `__init__.py`, shortened; it makes (B, L, N) of x, which is (B, L, 2N):

    def _inputs(case, make):                # the arguments of one call
        B, L, N = case.sizes("B", "L", "N")
        return {"x": make.data(B, L, 2 * N)}

    def _work(case, dtype):                 # forward moves 2N + N numbers, backward 2N + N + 2N
        B, L, N = case.sizes("B", "L", "N")
        size = B * L * N * dtype.itemsize
        return Work(0.0, forward_bytes=3 * size, backward_bytes=5 * size)

    SPEC = OpSpec(
        name="geglu",
        summary="value * gelu(gate), exact erf",
        backends=(                          # in the order in which `auto` prefers them
            Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
            Backend("reference", f"{__name__}.reference"),      # the reference is the last
        ),
        cases=_cases(SD_V2),                # what one training step of the benchmark calls ...
        cases_of=_cases,                    # ... and one of any other UNet
        small_cases=(Case("tiny", {"B": 1, "L": 2, "N": 5}),),  # for the interpreter
        inputs=_inputs,
        work=_work,
        family="activations",               # its colour in the chart of `estimate`
        saved_bytes=lambda case, dtype: 3 * B * L * N * dtype.itemsize,
    )

docs/kernels.md writes a whole op from nothing.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch

from sd_kernels.reasons import Reason
from sd_kernels.sd_v2_shapes import Architecture
from sd_kernels.targets import Target

Function = Callable[..., Any]
"""a differentiable function of tensors and options, all by keyword; gives a tensor or a tuple of
them"""


@dataclass(frozen=True)
class Draw:
    """How a case's input tensors are drawn: normal numbers, rows perhaps apart."""

    mean: float = 0.0
    std: float = 1.0
    padding: int = 0
    """elements between rows that belong to no row: the tensor is a view into a wider one"""


@dataclass(frozen=True)
class Case:
    """One kind of call, and how often one training step makes it."""

    name: str
    shape: Mapping[str, int]
    """sizes by letter, such as B samples"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """arguments that are no tensors"""
    draw: Draw = Draw()
    extras: Any = None
    """what else distinguishes its inputs, such as an optional bias: an instance of the dataclass
    `Extras` in the op's folder; None where the op has none"""
    calls: int = 1

    def sizes(self, *letters: str) -> tuple[int, ...]:
        """The sizes of these letters."""
        return tuple(self.shape[letter] for letter in letters)

    def at_batch(self, batch: int) -> Case:
        """The same call with another batch size."""
        return replace(self, shape={**self.shape, "B": batch})


def counted(calls: Iterable[Any], make: Callable[[Any], Case]) -> tuple[Case, ...]:
    """One case per distinct call, with the number of its calls, in order of first appearance."""
    return tuple(replace(make(call), calls=count) for call, count in Counter(calls).items())


class Inputs:
    """Makes an op's input tensors: drawn from a seed, or `empty`, where only shapes matter."""

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
        """Normal numbers that take gradients; rows are apart by the case's `padding`."""
        padding = self.case.draw.padding if len(shape) > 1 else 0
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
        return self.tensor(*shape, mean=self.case.draw.mean, std=self.case.draw.std)

    def image(self, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
        """`data` of shape (B, C, H, W) in channels-last memory."""
        return (
            self.data(batch, height, width, channels).detach().permute(0, 3, 1, 2).requires_grad_()
        )

    def kernel(self, out_channels: int, in_channels: int, side: int) -> torch.Tensor:
        """Channels-last weights (O, I, side, side) of a convolution that keeps the variance."""
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


def takes_anything(case: Case, dtype: torch.dtype) -> Reason | None:
    """Refuse nothing."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a function in a module of the op's folder.

    The function has the name of the op, unless `attribute` says otherwise.
    """

    name: str
    module: str
    attribute: str = ""
    """the function's name where a module holds several backends"""
    requires: str = ""
    """another module that must be importable, where `module` imports it only when it is called"""
    package: str = ""
    """the package it adapts, and the version whose signature its test checks; empty: it needs torch
    and triton alone"""
    install: str = ""
    """how to get that package"""
    capability: tuple[int, int] = (0, 0)
    """least compute capability; (0, 0) runs on a CPU too"""
    majors: tuple[int, ...] = ()
    """the only major versions of compute capability it is built for; empty: all"""
    gpu_dtypes: tuple[torch.dtype, ...] = ()
    """the only dtypes that it takes on a GPU; empty: all that the op takes"""
    refuses: Callable[[Case, torch.dtype], Reason | None] = takes_anything
    """why it cannot compute a case; None: it can"""
    automatic: bool = True
    """whether `auto` may choose it"""
    deterministic: bool = True
    """whether results on a GPU are the same bit for bit in each run, where torch is asked for that
    (`torch.use_deterministic_algorithms`)"""
    ours: bool = False
    """whether these are Triton kernels of this package. They run in the interpreter on a CPU, and
    are compared with the reference at the same dtype alone"""
    yardstick: bool = False
    """whether this is torch's own operator for the whole op. In 16 bits the errors of other
    libraries' kernels are compared with its error, too (`harness`)"""
    exact: bool = True
    """whether it must give the outputs that the spec calls exact bit for bit; otherwise they may
    have errors as all others"""

    def unfit(self, target: Target) -> Reason | None:
        """Why this backend cannot run on the target's hardware, or None."""
        if target.device != "cuda":
            runs_here = self.capability == (0, 0) or (self.ours and target.interpreted)
            needs = "needs a CUDA GPU"
            return (
                None if runs_here else Reason("hardware", f"{needs}, this is {target.name}", needs)
            )
        needed = ""
        if self.capability > target.capability:
            needed = "{}.{}".format(*self.capability)
        elif self.majors and target.capability[0] not in self.majors:
            needed = " or ".join(f"{major}.x" for major in self.majors)
        if not needed:
            return None
        there = "{} has {}.{}".format(target.name, *target.capability)
        text = f"needs compute capability {needed}, {there}"
        return Reason("hardware", text, f"needs capability {needed}")

    def missing(self, target: Target) -> Reason | None:
        """Why hardware or packages keep this backend from running on the target, or None."""
        if unfit := self.unfit(target):
            return unfit
        try:
            importlib.import_module(self.requires or self.module)
        except ImportError as error:
            text = f"{error}; {self.install}" if self.install else str(error)
            is_absent = isinstance(error, ModuleNotFoundError)
            return Reason("package", text, "not installed" if is_absent else "cannot be imported")
        return None

    def function(self, op: str) -> Function:
        """The op's implementation; ImportError where its package is absent."""
        return getattr(importlib.import_module(self.module), self.attribute or op)


@dataclass(frozen=True)
class Work:
    """FLOPs of a call's matmuls, and its least memory traffic.

    The bytes are those of reading every input and writing every output once.
    """

    flops: float
    """of the forward"""
    forward_bytes: float
    backward_bytes: float
    backward_flops: float = 0.0
    """including what is computed again; 0 stands for twice the forward's"""


class Matmul(NamedTuple):
    """The sizes of a matmul: (M, K) times (K, N)."""

    M: int
    N: int
    K: int

    @property
    def flops(self) -> float:
        """A multiply-add counts as two."""
        return 2.0 * math.prod(self)


@dataclass(frozen=True)
class Matmuls:
    """The three matmuls that a linear layer or a convolution (implicit GEMM) amounts to."""

    rows: int
    """outputs of the whole batch: tokens or pixels"""
    columns: int
    """output channels"""
    channels: int
    """input channels"""
    taps: int = 1
    """weights between an input and an output channel, such as 9"""
    stride: int = 1
    """in both directions"""
    bias: bool = False
    """whether there is a bias, for whose gradient torch sums that of the output over its rows"""

    @property
    def forward(self) -> Matmul:
        return Matmul(self.rows, self.columns, self.taps * self.channels)

    @property
    def grad_input(self) -> Matmul:
        """There are stride^2 inputs to an output, and each meets so many fewer taps."""
        area = self.stride**2
        return Matmul(self.rows * area, self.channels, self.taps * self.columns // area)

    @property
    def grad_weight(self) -> Matmul:
        return Matmul(self.columns, self.taps * self.channels, self.rows)


@dataclass(frozen=True)
class Attention:
    """What decides the rate of an attention kernel."""

    queries: int
    """of a sample"""


Family = Literal[
    "convolutions",
    "linear",
    "attention",
    "norms",
    "activations",
    "sums, copies, casts",
    "optimizer, inputs, loss",
]
"""groups of ops; each has one colour in the chart of `sd-perf estimate`"""


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
    family: Family
    cases_of: Callable[[Architecture], tuple[Case, ...]] | None = None
    """`cases` of a UNet of other sizes; None: a training step in bfloat16 does not call this op"""
    matmuls: Callable[[Case], Matmuls | Attention] | None = None
    """what the matrix units compute in a case; None: nothing"""
    saved_bytes: Callable[[Case, torch.dtype], int] | None = None
    """bytes of inputs and outputs that stay in memory until the backward pass. A tensor that two
    ops keep is counted by one of them. None: nothing, or all is counted by other ops"""
    outputs: tuple[str, ...] = ("y",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    exact: tuple[str, ...] = ()
    """outputs that must equal the reference's bit for bit"""
    differentiable: bool = True
    in_place: bool = False
    """whether it writes its outputs into its inputs, and returns these"""

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            families = ", ".join(map(repr, get_args(Family)))
            raise ValueError(f"{self.name}: family {self.family!r} is none of {families}")

    @property
    def ours(self) -> str | None:
        """Name of the backend with our Triton kernels; None where there is none."""
        return next((backend.name for backend in self.backends if backend.ours), None)

    def backend(self, name: str) -> Backend:
        """The backend of that name; StopIteration where there is none."""
        return next(backend for backend in self.backends if backend.name == name)

    def reference(self) -> Function:
        """The plain torch implementation."""
        return self.backends[-1].function(self.name)
