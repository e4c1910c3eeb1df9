"""The scores that are shown: FID, CLIP score and the tiny world's judge, of a run's weights and of
their average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd_perf.runs.scores import AVERAGE, is_number


@dataclass(frozen=True)
class Score:
    """One number of a line of scores.jsonl, and how it is shown."""

    key: str
    """in scores.jsonl; with `AVERAGE` in front, of the average of the weights"""
    name: str
    reading: str
    """which direction is better, or the unit; stands at the axis"""
    format: str
    percent: bool = False
    """the file has a fraction, the report shows per cent"""

    def lines(self, scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines that have this score, in their order."""
        return [line for line in scores if is_number(self.key, line.get(self.key))]

    def value(self, line: dict[str, Any]) -> float:
        """The number that is shown."""
        return 100 * line[self.key] if self.percent else line[self.key]

    def text(self, line: dict[str, Any]) -> str:
        """The number in words, with its unit."""
        return f"{self.value(line):{self.format}}" + (" %" if self.percent else "")


OF_WEIGHTS = (
    Score("fid", "FID", reading="lower is better", format=".2f"),
    Score("clip", "CLIP score", reading="higher is better", format=".3f"),
    Score("judge", "judge", reading="% of pictures right", format=".1f", percent=True),
)
OF_AVERAGE = tuple(
    replace(score, key=AVERAGE + score.key, name=f"{score.name} of the average")
    for score in OF_WEIGHTS
)
SCORES = (*OF_WEIGHTS, *OF_AVERAGE)


def shown_together(
    lines: Sequence[dict[str, Any]],
) -> Iterator[tuple[tuple[Score, ...], list[dict[str, Any]]]]:
    """The scores that one figure shows, and the lines that have one of them; of each kind that any
    line has."""
    for kind in (OF_WEIGHTS, OF_AVERAGE):
        own = [line for line in lines if any(score.lines([line]) for score in kind)]
        if own:
            yield kind, own
