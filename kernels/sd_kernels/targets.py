"""The one table of GPUs: what they are, how fast they are, and where each number comes from.

Kernels are chosen for a `Target`; `sd-perf estimate` and the benchmarks read the rates. Another GPU
is another entry of `GPUS`. Needs the standard library alone, so that the command line can list the
names before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple


@dataclass(frozen=True)
class Target:
    """The device that kernels are chosen for: this machine's, or a GPU of the table."""

    device: str
    """cpu or cuda"""
    name: str
    capability: tuple[int, int] = (0, 0)
    interpreted: bool = False
    """whether Triton's interpreter runs kernels on CPU tensors"""

    @classmethod
    def here(cls) -> Target:
        """The GPU of this process, or the CPU where there is none."""
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            return cls("cuda", properties.name, (properties.major, properties.minor))
        from sd_kernels.launch import interpreted

        name = "cpu, in Triton's interpreter" if interpreted() else "cpu"
        return cls("cpu", name, interpreted=interpreted())


class Rate(NamedTuple):
    """A rate, and where it was measured or published."""

    value: float
    source: str


class AttentionRates(NamedTuple):
    """TFLOP/s of an attention kernel: bfloat16, head dim 64, no mask, at 1024 and at 4096 tokens.

    Backward counts 2.5 times the forward's FLOPs, since it makes the scores again.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    source: str


@dataclass(frozen=True)
class GPU:
    """One card. Every rate has its source; a rate that nobody measured is the data sheet's."""

    name: str
    capability: tuple[int, int]
    """compute capability"""
    multiprocessors: int
    memory: float
    """bytes"""
    peak: Rate
    """dense bfloat16 FLOP/s of the data sheet"""
    matmul: Rate
    """FLOP/s of a large bfloat16 matmul with float32 sums"""
    bandwidth: Rate
    """bytes per second, read and written, of a large copy in device memory"""
    attention: Mapping[str, AttentionRates]
    """by library; at least one"""
    nvlink: Rate
    """bytes per second that the GPU sends to others of its node, and receives"""
    network: Rate
    """bytes per second of the node's network ports over its GPUs, in each direction"""
    driver_names: tuple[str, ...]
    """names that the driver gives this card"""
    same_peak: tuple[str, ...] = ()
    """driver names of other cards with the same chip and data-sheet peak, to which no other number
    here applies"""
    filled_waves: float = 1.0
    """share of its multiprocessors that the measured matmul kept busy, on average over its waves"""

    @property
    def target(self) -> Target:
        """What kernels are chosen for."""
        return Target("cuda", self.name, self.capability)

    @property
    def title(self) -> str:
        """Name and memory, as cards are sold."""
        return f"{self.name} {self.memory / 1e9:.0f} GB"

    @property
    def full_wave_flops(self) -> float:
        """FLOP/s of a matmul that keeps every multiprocessor busy."""
        return self.matmul.value / self.filled_waves


_NCCL_LINKS = "NCCL, src/graph/topo.h: links times SM80_, SM90_ or SM100_NVLINK_BW"
_FLASH_3_PAPER = "FlashAttention-3 paper, figures"
_HOPPER_ATTENTION = {
    "FlashAttention 2": AttentionRates((306, 321), (238, 279), _FLASH_3_PAPER),
    "cuDNN": AttentionRates((373, 408), (348, 417), _FLASH_3_PAPER),
    "FlashAttention 3": AttentionRates((392, 476), (363, 453), _FLASH_3_PAPER),
}
# 8192^3 makes 64 x 32 tiles of 128 x 256: 15.5 waves of 132 programs, which take the time of 16.
_HOPPER_WAVES = 8192 * 8192 / (128 * 256) / 132 / 16

GPUS: dict[str, GPU] = {
    "a100": GPU(
        name="A100",
        capability=(8, 0),
        multiprocessors=108,
        memory=80e9,
        peak=Rate(312e12, "NVIDIA A100 datasheet"),
        matmul=Rate(312e12, "data sheet"),
        bandwidth=Rate(2.0e12, "data sheet"),
        attention={
            "FlashAttention 2": AttentionRates(
                forward=(228, 228),
                backward=(197, 197),
                source="FlashAttention-2 paper: up to 73 and 63 % of 312, at any shape",
            )
        },
        nvlink=Rate(12 * 20.0e9, _NCCL_LINKS),
        network=Rate(25e9, "NVIDIA DGX A100 datasheet: a port of 200 Gb/s for each GPU"),
        driver_names=("NVIDIA A100-SXM4-80GB",),
        same_peak=("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"),
    ),
    "h100": GPU(
        name="H100",
        capability=(9, 0),
        multiprocessors=132,
        memory=80e9,
        peak=Rate(989e12, "NVIDIA H100 datasheet, SXM, half of the rate with sparsity"),
        matmul=Rate(798e12, "measured: 8192^3"),
        bandwidth=Rate(3.0e12, "measured: copy"),
        attention=_HOPPER_ATTENTION,
        nvlink=Rate(18 * 20.6e9, _NCCL_LINKS),
        network=Rate(50e9, "NVIDIA DGX H100 datasheet: a port of 400 Gb/s for each GPU"),
        driver_names=("NVIDIA H100 80GB HBM3",),
        filled_waves=_HOPPER_WAVES,
    ),
    "h200": GPU(
        name="H200",
        capability=(9, 0),
        multiprocessors=132,
        memory=141e9,
        peak=Rate(989e12, "NVIDIA H200 datasheet, SXM, half of the rate with sparsity"),
        matmul=Rate(798e12, "H100's measurement: 8192^3"),
        bandwidth=Rate(4.3e12, "measured: copy"),
        attention=_HOPPER_ATTENTION,
        nvlink=Rate(18 * 20.6e9, _NCCL_LINKS),
        network=Rate(50e9, "NVIDIA DGX H200 datasheet: a port of 400 Gb/s for each GPU"),
        driver_names=("NVIDIA H200",),
        filled_waves=_HOPPER_WAVES,
    ),
    "b200": GPU(
        name="B200",
        capability=(10, 0),
        multiprocessors=148,
        memory=180e9,
        peak=Rate(
            2250e12, "NVIDIA HGX B200 datasheet, one of eight GPUs, half of the rate with sparsity"
        ),
        matmul=Rate(2250e12, "data sheet"),
        bandwidth=Rate(8.0e12, "data sheet"),
        attention={
            "FlashAttention 2": AttentionRates(
                forward=(359, 307),
                backward=(281, 315),
                source="Dao-AILab/flash-attention issue 1589",
            ),
            "FlashAttention 4": AttentionRates(
                forward=(619, 825),
                backward=(619, 825),
                source="flash-attention PR 2605; backward assumed as fast",
            ),
        },
        nvlink=Rate(18 * 40.1e9, _NCCL_LINKS),
        network=Rate(50e9, "NVIDIA DGX B200 datasheet: a port of 400 Gb/s for each GPU"),
        driver_names=("NVIDIA B200",),
    ),
}
"""by the name that `--target` and `--gpu` take"""


def names() -> tuple[str, ...]:
    """The names that `--target` and `--gpu` take."""
    return tuple(GPUS)


def named(name: str) -> GPU:
    """The GPU of that name. Raises LookupError, with the names that there are."""
    if name not in GPUS:
        close = get_close_matches(name, GPUS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise LookupError(f"{name!r} is not known{hint}; choose {', '.join(GPUS)}")
    return GPUS[name]


def key_of_driver(driver_name: str) -> str | None:
    """The key in `GPUS` of the card with this driver name; None where the table lacks it.

    The name must match exactly, since PCIe and NVL cards of the same chips are slower.
    """
    return next((key for key, gpu in GPUS.items() if driver_name in gpu.driver_names), None)


def peak_of_driver(driver_name: str) -> Rate | None:
    """Dense bfloat16 FLOP/s of the card with exactly this driver name, and their source.

    None where the table lacks the card: a peak is never guessed.
    """
    for gpu in GPUS.values():
        if driver_name in (*gpu.driver_names, *gpu.same_peak):
            return gpu.peak
    return None
