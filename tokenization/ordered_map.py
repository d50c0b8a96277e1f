"""A function over items in a few threads, results in order and never far ahead of their reader."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each holds what it works on; four inflate and encode faster than most disks deliver.
MAX_THREADS = 4


def available_threads() -> int:
    """Threads that are worth starting: the cores this process may use, `MAX_THREADS` at the most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int) -> Iterator[Result]:
    """function(item) of each item, in order, at most `threads` + 1 of them begun and not yet taken.

    Items are drawn in the thread that takes the results; an error is raised in place of its result.
    """
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                begun.append(pool.submit(function, item))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
