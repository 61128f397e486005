"""Which nodes exchange data at the same time: a round-robin tournament."""

Round = tuple[tuple[int, int], ...]
"""Disjoint pairs (a, b) with a < b."""


def tournament(players: int) -> tuple[Round, ...]:
    """Rounds in which each of `players` meets each other exactly once.

    An even number of players takes `players - 1` rounds in which all play; an odd one takes `players`, with one pausing in each.
    """
    places: list[int | None] = list(range(players))
    if players % 2:
        places.append(None)  # who meets it pauses
    rounds = []
    for _ in range(len(places) - 1):
        opposite = zip(places, reversed(places[len(places) // 2 :]), strict=False)
        rounds.append(tuple((min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None))
        places = [places[0], places[-1], *places[1:-1]]  # the first stays, the others move on by one place
    return tuple(rounds)


def opponents(players: int, player: int) -> tuple[int | None, ...]:
    """Whom `player` meets in each round; None where it pauses."""
    return tuple(
        next((a + b - player for a, b in pairs if player in (a, b)), None) for pairs in tournament(players)
    )
