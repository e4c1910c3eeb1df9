"""Threads that work ahead of the one that takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
    """`map` by threads: results in the order of the items, at most `ahead` of them waiting.

    `ahead` is twice the threads unless given; each thread calls `begin` first. This is for work
    that leaves Python's lock, such as decoding and resizing images. What has not begun when the
    caller stops is dropped.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=begin)
    try:
        for item in items:
            if len(waiting) == (ahead or 2 * threads):
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
