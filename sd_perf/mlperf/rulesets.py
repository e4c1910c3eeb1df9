"""Which round's rules a log was written for."""

from __future__ import annotations

import datetime
import itertools

from sd_perf.mlperf.log import Event
from sd_perf.mlperf.rules import RULESET

_PUBLISHED = {
    "3.0.0": datetime.date(2023, 6, 27),
    "3.1.0": datetime.date(2023, 11, 8),
    "4.0.0": datetime.date(2024, 6, 12),
    "4.1.0": datetime.date(2024, 11, 13),
    "5.0.0": datetime.date(2025, 6, 4),
}
"""ruleset: the day on which MLCommons published the round's results"""


def ruleset_of(events: list[Event]) -> tuple[str, str]:
    """The ruleset of a log and why it is this one, in words.

    Logs that count steps are of 3.1.0. Otherwise it is the first round that was published after the
    run began; 5.0.0, the last one with the benchmark, for later runs and where the log tells no
    time.
    """
    scored = [event.metadata for event in events if event.key == "eval_accuracy"]
    if scored and all("step_num" in place and "samples_count" not in place for place in scored):
        return "3.1.0", "its evaluations count steps (step_num), which later rulesets do not take"
    start = next((event.time_ms for event in events if event.key == "run_start"), 0)
    try:
        day = datetime.datetime.fromtimestamp(start / 1000, datetime.UTC).date()
    except (ValueError, OverflowError, OSError):
        return RULESET, "the time of its run_start is none of a calendar"
    rounds = list(_PUBLISHED.items())
    for (_, before), (ruleset, published) in itertools.pairwise(rounds):
        if before < day <= published:
            return ruleset, (
                f"the run began on {day}, before the round's results were published ({published})"
            )
    return RULESET, "it is the last one with this benchmark"
