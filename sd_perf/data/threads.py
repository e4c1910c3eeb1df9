"""Threads that work ahead of the one that takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    ahead: int = 0,
    begin: Callable[[], None] | None = None,
) -> Generator[Result, None, None]:
    """`map` by threads: results in the order of the items, `ahead` of them made or waiting.

    `ahead` is twice the threads unless given; each thread calls `begin` first. This is for work
    that leaves Python's lock, such as decoding and resizing images. Closing the generator ends the
    threads; what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sd_perf_data", initializer=begin)
    try:
        items = iter(items)
        waiting = deque(pool.submit(function, item) for item in islice(items, ahead or 2 * threads))
        for item in items:
            result = waiting.popleft().result()
            waiting.append(pool.submit(function, item))
            yield result
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
