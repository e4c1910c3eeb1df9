"""Measurements that may fail without ending the run: other rows are worth having."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from sd_perf.files import one_line


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether GPU memory ran out.

    Looks along the chain of contexts: ending a broken capture raises a second error on top.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__context__
    return False


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns; where it raises, the columns `status` and `reason`.

    The status is `out of memory`, which is a finding, or else `failed`.
    """
    try:
        return measure()
    except Exception as error:  # whatever it is: it must not cost the other rows
        return {
            "status": "out of memory" if is_out_of_memory(error) else "failed",
            "reason": one_line(error),
        }


def release_memory() -> dict[str, Any]:
    """Give unused GPU memory back to the driver. Returns no columns: made for `attempt`."""
    gc.collect()
    torch.cuda.empty_cache()
    return {}
