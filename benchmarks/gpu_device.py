"""What the parts of `gpu_acceptance` run on: a GPU at full size, or a CPU in their rehearsal."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any, ClassVar, NamedTuple

import torch

from benchmarks.gpu_environment import Telemetry, describe, measure_ceilings, measure_copy
from benchmarks.timing import Clock, CudaClock
from sd_kernels.launch import interpreted
from sd_kernels.registry import all_ops
from sd_kernels.spec import Case, OpSpec
from sd_kernels.targets import GPUS
from sd_perf.config import UNetConfig


class Scale(NamedTuple):
    """A network and the size of its latents."""

    config: UNetConfig
    latent_size: int


class Device:
    """A CUDA GPU, with the benchmark's network and a small one of a fifth of its width."""

    name: ClassVar[str] = "cuda"
    most_seconds = math.inf
    """longest time for which one thing is timed"""
    small = Scale(UNetConfig(model_channels=64, context_dim=128), 32)
    """heads have 64 channels still"""
    full = Scale(UNetConfig(), 64)

    def gpu(self) -> str:
        """The GPU's name as the driver gives it."""
        return torch.cuda.get_device_properties(0).name

    def describe(self) -> dict[str, Any]:
        """Name, size, limits and driver; see `gpu_environment.describe`."""
        return describe()

    def ceilings(self) -> dict[str, float]:
        """Measured rates; see `gpu_environment.measure_ceilings`."""
        return measure_ceilings()

    def triton_ops(self) -> list[str]:
        """Operators whose Triton kernels are prepared."""
        return [name for name, spec in all_ops().items() if spec.ours]

    def require_sound(self) -> None:
        """RuntimeError where an earlier error has left the device unusable for this process."""
        # A process that has not touched the GPU yet must be able to fork.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a copy within the device's memory."""
        return measure_copy()

    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return torch.cuda.get_device_properties(0).L2_cache_size

    def sized(self, spec: OpSpec, case: Case) -> Case:
        """The case that is run where this one of the op is asked for."""
        return case

    def clock(self) -> Clock:
        """Marks moments of the device's work."""
        return CudaClock()

    def side_stream(self) -> contextlib.AbstractContextManager[object]:
        """A stream that is not the default one, on which a capture is allowed."""
        return torch.cuda.stream(torch.cuda.Stream())

    def telemetry(self) -> Telemetry:
        """Samples clocks and power while the block runs."""
        return Telemetry()

    def restart_peak_memory(self) -> None:
        """Give unused memory back to the driver, and count peaks from now on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> dict[str, int]:
        """Columns of a `ThroughputRow`: peaks since `restart_peak_memory`, bytes."""
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }


class Rehearsal(Device):
    """A CPU with tiny networks: the same code runs, and no number is a result."""

    name = "cpu"
    most_seconds = 0.3
    small = full = Scale(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2),
            num_head_channels=32,
            context_dim=32,
            transformer_groups=8,
        ),
        8,
    )

    def gpu(self) -> str:
        return f"rehearsal of {GPUS['h100'].driver_names[0]} on a CPU"

    def describe(self) -> dict[str, Any]:
        return {"gpu": self.gpu(), "compute_capability": "9.0"}

    def ceilings(self) -> dict[str, float]:
        return {}

    def triton_ops(self) -> list[str]:
        return [] if interpreted() else ["v_mse_loss"]

    def require_sound(self) -> None:
        pass

    def copy_rate(self) -> float:
        return 1e6

    def l2_bytes(self) -> int:
        return 2**10

    def sized(self, spec: OpSpec, case: Case) -> Case:
        return spec.small_cases[0]

    def clock(self) -> Clock:
        return HostClock()

    def side_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def telemetry(self) -> Telemetry:
        return Telemetry(lambda: None)

    def restart_peak_memory(self) -> None:
        pass

    def peak_memory(self) -> dict[str, int]:
        return {}


class HostClock:
    """A `Clock` of the host, for work that is done when its call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [1000 * (then - first) for first, then in pairs]
