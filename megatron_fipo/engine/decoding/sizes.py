"""Sizes of batches and lengths that graphs exist for: powers of two and one and a half times these."""

LEAST_ROWS, LEAST_LENGTH = 8, 128
"""Smaller ones would not be faster."""


def size_class(count: int, least: int) -> int:
    """The smallest size of at least `count`; `least`, a power of two, is the first one."""
    size = least
    while size < count:
        size = _next(size)
    return size


def largest_within(limit: int, least: int) -> int:
    """The largest size of at most `limit`; below `least` any number is one."""
    if limit < least:
        return limit
    size = least
    while _next(size) <= limit:
        size = _next(size)
    return size


def _next(size: int) -> int:
    return size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
