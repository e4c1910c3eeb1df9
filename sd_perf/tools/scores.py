"""The scores that a report shows: FID, CLIP score and the tiny world's judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sd_perf.runs.scores import is_number


@dataclass(frozen=True)
class Score:
    """One number of a line of scores.jsonl, and how it is shown."""

    key: str
    """in scores.jsonl"""
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


SCORES = (
    Score("fid", "FID", reading="lower is better", format=".2f"),
    Score("clip", "CLIP score", reading="higher is better", format=".3f"),
    Score("judge", "judge", reading="% of pictures right", format=".1f", percent=True),
)
