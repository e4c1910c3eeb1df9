"""Puts the official compliance checker's messages into sentences: line, value, remedy."""

from __future__ import annotations

import re
from collections import defaultdict

from sd_perf.files import quoted
from sd_perf.mlperf.log import Event
from sd_perf.mlperf.rules import CLIP_TARGET, FID_TARGET
from sd_perf.visible import visible

_CHECK = re.compile(r"CHECK for '(\S+)' failed in line (-?\d+):\n.*\nfailed test: (.*)")
_COUNTS = {
    "EXACTLY_ONE": "exactly once",
    "AT_LEAST_ONE": "at least once",
    "AT_LEAST(2)": "at least twice",
}
_EVALUATIONS = "evaluations with both FID and CLIP"
_ORDER = "put the lines in the order init_start, init_stop, run_start, blocks, run_stop"
_LIMIT = (
    "initialisation must take less than 30 minutes in the closed division, 240 in the open one, "
    "and submission_division must come before init_stop"
)
_PLACE = "its metadata must hold samples_count (step_num in 3.1.0)"
_TESTS = (
    (r"s\['init_started'\]", f"init_start must come before it; {_ORDER}"),
    (r"\( s\['init_stopped'\] == True \)", f"init_stop must come before it; {_ORDER}"),
    (r"s\['run_started'\]", f"run_start must come before it; {_ORDER}"),
    (r"not s\['init_stopped'\]", f"it must come before init_stop; {_ORDER}"),
    (r"not s\['run_started'\]", f"it must come before run_start; {_ORDER}"),
    (r"ll\.timestamp - s\['first_init_start'\] .*", _LIMIT),
    (r"'status' in v\['metadata'\]", "its metadata must hold a status, success or aborted"),
    (r".*'(samples_count|step_num)' in v\['metadata'\]\)?", _PLACE),
    (r"v\['metadata'\]\['(\w+)'\] >=? 0 .*", r"its \1 must not be negative"),
    (r"v\['value'\] == (.+)", r"it must be \1; train with that, or log the open division"),
    (r"v\['value'\] >= 0(\.0)?", "it must be 0 or more"),
    (r"v\['value'\] > 0", "it must be more than 0"),
    (r"v\['value'\] != ''", "it must not be empty"),
    (r"v\['value'\] in \[(.+)\]", r"it must be one of \1"),
)
"""tests of the checker, which prints them as Python source, and what they mean"""
_MISSING = {
    "run_stop": "the run is not over: train on and evaluate, or the log was cut off",
    "run_start": "log it at the first touch of the training data",
    "init_start": "log it first of the process",
    "init_stop": "log it when everything is compiled and loaded",
    "cache_clear": "log it when the file caches are dropped",
    "submission_division": "log it before init_stop",
    "submission_benchmark": "log it before init_stop",
    "eval_accuracy": "evaluate the checkpoints (sd-perf evaluate)",
    "block_start": "log one at the start and after every checkpoint",
    "block_stop": "log one at every checkpoint",
}
"""key that is missing: what to do"""
_CONSTANT = "log it before init_stop"


def in_words(message: str, events: list[Event], lines: dict[int, int]) -> str:
    """One sentence for one message of the checker.

    `lines` takes the checker's number of a line, which counts log lines from 0, to that in the
    file.
    """
    count = re.match(r"Required (\S+) occurrence of (.+?)(?: but found (\d+)(.*))?$", message)
    if count:
        wanted, key, found, more = count.groups()
        return _count(wanted, key, found, more, events)
    if message.startswith("Failed checks for aggregated_eval_accuracy"):
        return _no_pass(events)
    if failed := _CHECK.match(message):
        number = lines.get(int(failed[2]))
        event = next((event for event in events if event.line == number), None)
        value = quoted(event.value) if event and event.value is not None else "null"
        where = f"line {number}: " if number else ""
        return f"{where}{visible(failed[1])} is {value}: {_meaning(failed[3].strip())}"
    if message.startswith("Failed executing"):
        return _broken_rule(message, events)
    return visible(message.splitlines()[0])


def _count(wanted: str, key: str, found: str | None, more: str | None, events: list[Event]) -> str:
    name = key.replace("'", "")
    times = f"must stand {_COUNTS.get(wanted, wanted)}, found {found or 0}"
    if name == "aggregated_eval_accuracy":
        return f"{_EVALUATIONS}: {times}; evaluate further checkpoints (sd-perf evaluate)"
    if int(found or 0) == 0:
        first = name.split(" or ")[0]
        return f"{name}: {times}; {_MISSING.get(first, _CONSTANT)}"
    places = [event.line for event in events if event.key == name]
    words = visible(more or "")
    return f"{name}: {times}{words} ({in_lines(places)}); keep the line of this run"


def in_lines(numbers: list[int]) -> str:
    """`line 3`, `lines 3 and 7`, `lines 3, 7, 9 and 12 more`."""
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    if len(numbers) <= 4:
        return f"lines {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return f"lines {', '.join(map(str, numbers[:3]))} and {len(numbers) - 3} more"


def _no_pass(events: list[Event]) -> str:
    scores: dict[object, dict[object, object]] = defaultdict(dict)
    for event in events:
        if event.key == "eval_accuracy":
            place = event.metadata.get("samples_count", event.metadata.get("step_num"))
            scores[quoted(place)][event.metadata.get("metric")] = event.value
    last = next(reversed(scores.items()), None)
    words = f"; the last one, at {last[0]}, has FID {last[1].get('FID')} and CLIP " if last else ""
    return (
        f"no evaluation passes: the target is FID <= {FID_TARGET:g} and CLIP >= {CLIP_TARGET:g}"
        f"{words}{last[1].get('CLIP') if last else ''}"
    )


def _meaning(test: str) -> str:
    for pattern, words in _TESTS:
        if match := re.fullmatch(pattern, test):
            return match.expand(words) if match.groups() else words
    return f"it breaks the rule {test}"


def _broken_rule(message: str, events: list[Event]) -> str:
    """A rule that the checker could not compute on a line: its value is of the wrong kind."""
    rows = [row.strip() for row in message.splitlines()]
    source = next((row for row in rows if row.startswith(":::MLLOG")), "")
    key = re.search(r'"key":\s*"([^"]*)"', source)
    value = re.search(r'"value":\s*(.+?),\s*"metadata"', source)
    name = visible(key[1]) if key else "a line"
    numbers = [event.line for event in events if key and event.key == key[1]]
    where = f"{in_lines(numbers)}: " if numbers else ""
    test = rows[1] if len(rows) > 1 else ":::"
    rule = "this value cannot stand there" if test.startswith(":::") else _meaning(test)
    return f"{where}{name} is {visible(value[1][:100]) if value else '?'}: {rule}"
