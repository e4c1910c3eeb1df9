"""Measurements that may fail: what is measured before and after a failure is worth having."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from sd_perf.files import one_line


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether GPU memory ran out, also where ending a broken capture raised a second error on
    top."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__context__
    return False


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or a status and the reason: `out of memory` is a result, `failed` is
    not."""
    try:
        return measure()
    except Exception as error:  # whatever it is, the rows before and after it are worth having
        return {
            "status": "out of memory" if is_out_of_memory(error) else "failed",
            "reason": one_line(error),
        }


def release_memory() -> dict[str, Any]:
    """Give all GPU memory that nothing refers to back to the driver."""
    gc.collect()
    torch.cuda.empty_cache()
    return {}
