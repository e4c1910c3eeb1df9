"""A sink: a tool that gets a copy of a run's curves and pictures while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class SinkRun:
    """What a sink is told of the run when it is opened."""

    folder: Path
    run_id: str
    """of the manifest: a run that is resumed goes on under the name that it had"""
    config: Mapping[str, Any]
    position: int | None
    """samples from which training goes on, so that later values are void; None: nothing is void"""


class Sink(Protocol):
    """What `logging.sinks` names. It raises what its library raises; `Feed` answers that."""

    keeps_values: bool
    """whether it still has what earlier processes of the run gave it"""

    def values(self, group: str, samples: int, values: Mapping[str, float]) -> None:
        """Take numbers of one position.

        `group` is "train", "scores" or "scores_ema", as panels show it.
        """
        ...

    def picture(self, samples: int, path: Path) -> None:
        """Take a PNG file of pictures drawn at a position."""
        ...

    def close(self) -> None:
        """The process gives no more."""
        ...
