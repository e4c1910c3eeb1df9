"""How the processes of a run find each other: one store, which rank 0 or torchrun's agent holds."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import sys
import time

import torch.distributed as dist

from sd_perf.distributed.launcher import Place
from sd_perf.errors import ConfigError

_SAY_AFTER = 5.0
"""seconds after which who waits says so"""
_NAMED = 8
"""missing ranks that are named, at most"""


def meet(place: Place, seconds: float) -> dist.Store:
    """A store that all processes of the run have joined, within so many seconds.

    ConfigError, which says who is missing, where some have not come by then.
    """
    end = time.monotonic() + seconds
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds_store = place.rank == 0 and not agent
    if not holds_store:
        _wait_for_store(place, end, seconds)
    try:
        store = dist.TCPStore(
            "127.0.0.1" if holds_store else place.address,
            place.port,
            is_master=holds_store,
            timeout=datetime.timedelta(seconds=max(1.0, seconds)),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # torchrun's store outlives a restart of its processes.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        joined = dist.PrefixStore(f"sd_perf/{attempt}", store)
        _wait_for_all(joined, place, end, seconds)
    except dist.DistError as error:
        here = f"{place.address}:{place.port}"
        if holds_store:
            raise ConfigError(
                f"MASTER_PORT: cannot listen at {here} (is another run there?); set another port"
            ) from error
        raise ConfigError(f"rank 0 at {here} has left while the processes met") from error
    return joined


def _wait_for_store(place: Place, end: float, seconds: float) -> None:
    """Wait until rank 0 answers. torch's own waiting could neither be told of nor interrupted."""
    where, say_at, reason = f"rank 0 at {place.address}:{place.port}", _say_at(), ""
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=2).close()
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return
        if time.monotonic() > end:
            raise ConfigError(
                f"{where} has not answered within {seconds:g} s ({reason}); start it, or set "
                "MASTER_ADDR and MASTER_PORT to where it listens"
            )
        if time.monotonic() > say_at:
            _say(f"rank {place.rank}: waiting for {where}")
            say_at = end + 1
        time.sleep(0.2)


def _wait_for_all(store: dist.Store, place: Place, end: float, seconds: float) -> None:
    store.set(f"host/{place.rank}", platform.node())
    if store.add(f"here/{place.rank}", 1) > 1:
        raise ConfigError(f"RANK: {place.rank} is taken by two processes; start each rank once")
    store.add("here", 1)
    say_at = _say_at()
    while (missing := place.size - store.add("here", 0)) > 0:
        if time.monotonic() > end:
            raise ConfigError(_who_is_missing(store, place.size, missing, seconds))
        if time.monotonic() > say_at and place.rank == 0:
            _say(f"waiting for {missing} more process{'es' if missing > 1 else ''}")
            say_at = end + 1
        time.sleep(0.1)


def _who_is_missing(store: dist.Store, size: int, missing: int, seconds: float) -> str:
    ranks = [str(rank) for rank in range(size) if not store.check([f"here/{rank}"])][:_NAMED]
    more = f" and {missing - _NAMED} more" if missing > _NAMED else ""
    return (
        f"{size - missing} of {size} processes have come within {seconds:g} s; missing: rank "
        f"{', '.join(ranks)}{more}; start them, or raise --run.join-seconds"
    )


def _say_at() -> float:
    return time.monotonic() + _SAY_AFTER


def _say(words: str) -> None:
    print(f"sd-perf: {words}", file=sys.stderr, flush=True)
