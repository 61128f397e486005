"""A count of the work that this process has done, read by the heartbeat of a trainer rank (`driver/rank_actor.py`).

Whatever can take minutes advances it after each piece: a micro-batch, a tensor that is loaded, exported or sent, a block of
a file, a growing checkpoint, and each second of a wait that has a deadline of its own. A rank that waits for the others in a
collective does not.
"""

_count = 0


def advance() -> None:
    """A piece of work is done. Costs 50 ns; a lost increment between threads does no harm."""
    global _count
    _count += 1


def count() -> int:
    """How often `advance` was called."""
    return _count
