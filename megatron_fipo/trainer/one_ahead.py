"""Prepare the next item in a thread while the present one is in use: two are in memory at a time, not all."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(make: Callable[[int], Item], use: Callable[[int, Item], Result], count: int) -> list[Result]:
    """`[use(0, make(0)), use(1, make(1)), ...]`, with `make(i + 1)` running in a thread during `use(i, ...)`.

    No more than two items exist at once. The first error of either is raised, after the thread has ended.
    """
    results = []
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(make, 0) if count else None
        for index in range(count):
            assert upcoming is not None
            item = upcoming.result()
            upcoming = thread.submit(make, index + 1) if index + 1 < count else None
            results.append(use(index, item))
            del item  # before the next is waited for: the one after it is begun then
    return results
