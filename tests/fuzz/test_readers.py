"""Arbitrary and mutated bytes give every reader a value or one UserError, never another exception.

The property tests are short; the fuzz target runs for a minute, in `make test-all`. More of it:
SD_PERF_FUZZ_SECONDS=3600 python -m pytest tests/fuzz -s
"""

from __future__ import annotations

import os
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.readers import READERS, check
from tests.fuzz.seeds import SEEDS

SECONDS = float(os.environ.get("SD_PERF_FUZZ_SECONDS", "60"))
MEMORY = 600 * 2**20
"""bytes by which all of the fuzzing may enlarge the process"""
TOKENS = (
    b"[" * 2000,
    b'{"a":' * 500,
    b"9" * 5000,
    b"1e400",
    b"NaN",
    b"-Infinity",
    b"null",
    b"true",
    b'"\\ud800"',
    b'"',
    b"[]",
    b"{}",
    b"-1",
    b"0",
    b"1" * 19,
    b"1.5",
    b"\0",
    b"\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00" * 512,
    b"\xff" * 8,
    b"../",
    b"*a",
    b"&a ",
    b"!!int ",
    b"<<: ",
    b"~",
    b": ",
    b"- ",
    b"1:30",
    b"(" * 300,
    b"'descr': 'O'",
    b"<f4",
    b"(1, 8, 2, 2)",
    b"\x7f\xff\xff\xff",
)
"""pieces of the formats, and values at the edges of them"""


def mutated(draw: random.Random, content: bytes) -> bytes:
    """The content with one to eight small damages."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place = draw.randrange(len(data) + 1)
        length = draw.choice((0, 1, 1, 2, 8, 64, 512))
        kind = draw.randrange(5)
        if kind == 0:
            data[place : place + length] = draw.choice(TOKENS)
        elif kind == 1 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + length] = draw.randbytes(length)
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_the_seed_is_taken(name, tmp_path):
    """Else mutations of it would show little."""
    assert check(name, tmp_path, SEEDS[name])


@pytest.mark.parametrize("name", READERS)
def test_bytes_give_a_value_or_a_sentence(name, tmp_path):
    @settings(
        max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(st.binary(max_size=600), st.randoms(use_true_random=False)))
    def property(draw: bytes | random.Random) -> None:
        check(name, tmp_path, draw if isinstance(draw, bytes) else mutated(draw, SEEDS[name]))

    property()


@pytest.mark.slow
def test_a_minute_of_fuzzing():
    """Prints how many inputs each reader had, and how many of them it took.

    The minute is one of a CPU core, so that a machine that is busy otherwise tries as many.
    """
    seed = random.randrange(2**32)
    draw, tried, taken = random.Random(seed), Counter(), Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.process_time() + SECONDS
    corpus = {name: [content] for name, content in SEEDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        while time.process_time() < end:
            name = draw.choice(list(READERS))
            content = mutated(draw, draw.choice(corpus[name]))[: 2**17]
            try:
                accepted = check(name, Path(folder), content)
            except BaseException as error:
                error.add_note(f"{name}, fuzzed with seed {seed}: {content[:2000]!r}")
                raise
            tried[name] += 1
            taken[name] += accepted
            if accepted and len(corpus[name]) < 500:  # damage that is taken is a new start
                corpus[name].append(content)
            for path in Path(folder).rglob("*.*"):
                path.unlink()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(f"{sum(tried.values()):,} inputs, memory grew by {grown / 2**20:.0f} MiB")
    for name in READERS:
        print(f"  {name}: {tried[name]:,} tried, {taken[name]:,} taken")
    assert grown < MEMORY
    assert all(tried[name] > SECONDS / 10 for name in READERS)
