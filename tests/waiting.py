"""Waiting for what another process or thread does, on a machine that may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""seconds after which a test takes what it waits for as hung: a machine that is busy or slow needs
ten times as long as a free one, and a limit that is long costs time only where a test fails"""


def wait_for(condition: Callable[[], object], poll: float = 0.02) -> None:
    """Until the condition holds, looked at every `poll` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(poll)
