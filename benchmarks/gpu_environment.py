"""The GPU and software that numbers are measured on.

Its data sheet's peak, two rates measured in the same run (a device copy, a large matmul), and its
clocks, power and temperature under load.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from types import TracebackType
from typing import Any

import torch

from benchmarks.timing import CudaClock, timed
from sd_kernels.targets import peak_of_driver

CLOCK_EVENT_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock",
}
"""bits of clocks_event_reasons.active"""

TELEMETRY_FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")

GEMM_SIZE = 8192
COPY_BYTES = 2**31


def nvidia_smi(fields: Sequence[str]) -> list[str] | None:
    """Values of nvidia-smi's query fields for torch's GPU 0, as it prints them.

    None where nvidia-smi is absent, fails, or answers with another number of values. Only reads.
    """
    # Not by index: under CUDA_VISIBLE_DEVICES torch's GPU 0 may be another one of nvidia-smi's.
    uuid = torch.cuda.get_device_properties(0).uuid
    query = f"--query-gpu={','.join(fields)}"
    output = _output_of(["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"])
    values = [value.strip() for value in (output or "").split(",")]
    return values if len(values) == len(fields) else None


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def software() -> dict[str, Any]:
    """Versions by name; None: not there."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
    }


def describe() -> dict[str, Any]:
    """GPU 0 and its driver: name, size, limits and data-sheet peak. Needs a CUDA device.

    Memory in bytes, power in W, clocks in MHz, the peak in FLOP/s; None: unknown.
    """
    properties = torch.cuda.get_device_properties(0)
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    driver, power_limit, sm_clock, memory_clock = nvidia_smi(fields) or ("",) * len(fields)
    peak, source = peak_of_driver(properties.name) or (None, None)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "power_limit_w": _number(power_limit),
        "sm_clock_max_mhz": _number(sm_clock),
        "memory_clock_max_mhz": _number(memory_clock),
        "dense_bf16_peak_flops": peak,
        "dense_bf16_peak_source": source,
        "driver": driver or None,
    }


def measure_copy() -> float:
    """Bytes per second, read and written both counted, of a copy within device memory."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_seconds(partial(target.copy_, source), 20)


def measure_ceilings() -> dict[str, float]:
    """The rates of a device copy (bytes per second) and of a large bf16 matmul (FLOP/s).

    A memory-bound kernel comes no closer to the data sheet than the one, a matmul than the other.
    """
    copy_rate = measure_copy()
    # Random data: a matmul of zeros draws less power and runs faster than any real one.
    shape = (GEMM_SIZE, GEMM_SIZE)
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm_seconds = _median_seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), 200)
    return {
        "copy_bytes_per_second": copy_rate,
        "gemm_8192_bf16_flops": 2 * GEMM_SIZE**3 / gemm_seconds,
    }


def _median_seconds(call: Callable[[], object], count: int) -> float:
    timed(call, 3, CudaClock())
    return statistics.median(timed(call, count, CudaClock())) / 1000


def _number(text: str) -> float | None:
    """A value of nvidia-smi as a number; None for the [N/A] of a field that a card lacks."""
    try:
        return float(text)
    except ValueError:
        return None


def reason_names(mask: str) -> list[str]:
    """Names of the bits set in clocks_event_reasons.active, a hexadecimal number.

    None are set where the text is no number.
    """
    try:
        bits = int(mask, 16)
    except ValueError:
        return []
    return [name for bit, name in CLOCK_EVENT_REASONS.items() if bits & bit]


def summarise_telemetry(samples: list[list[str]]) -> dict[str, Any]:
    """Clock, power, temperature and throttling of a run, from its second half.

    samples: values of TELEMETRY_FIELDS, oldest first. Returns columns of a row: median clock
    (MHz) and power (W), highest temperature (C), all reasons for lower clocks. None: unknown.
    """
    settled = samples[len(samples) // 2 :]
    clock, power, temperature = (
        [value for row in settled if (value := _number(row[column])) is not None]
        for column in range(3)
    )
    reasons = sorted({name for row in settled for name in reason_names(row[3])})
    return {
        "sm_clock_mhz": statistics.median(clock) if clock else None,
        "power_w": statistics.median(power) if power else None,
        "temperature_c": max(temperature) if temperature else None,
        "clock_event_reasons": reasons if settled else None,
    }


class Telemetry:
    """Samples nvidia-smi in a thread while the block runs; `summary()` afterwards."""

    def __init__(
        self,
        query: Callable[[], list[str] | None] = lambda: nvidia_smi(TELEMETRY_FIELDS),
        period_seconds: float = 1.0,
    ) -> None:
        """query: gives the values of TELEMETRY_FIELDS, or None where there are none."""
        self._query = query
        self._period = period_seconds
        self._samples: list[list[str]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="telemetry", daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(self._period):
            values = self._query()
            # An answer that comes after the work has ended tells of an idle card.
            if values is not None and not self._done.is_set():
                self._samples.append(values)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        """`summarise_telemetry` of the samples."""
        return summarise_telemetry(self._samples)
