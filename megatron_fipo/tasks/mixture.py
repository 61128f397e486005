"""Training sets in proportion to their weights, however many problems each has.

The set of the n-th prompt depends on n and the seed alone: n steps of the golden ratio on a circle, on which every set has an
arc as long as its share. The points of such a sequence lie evenly in every window of it, so that the shares hold in every
iteration and not only on average. A step can be undone, and it takes no memory.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.dataset import Dataset, digest
from megatron_fipo.tasks.task import Problem

CIRCLE = 2**64
GOLDEN_STEP = 0x9E3779B97F4A7C15
"""`CIRCLE` divided by the golden ratio, odd."""


class Mixture:
    """Problems of several sets in an order that depends on the seed, the sets and their weights only.

    Each set has its own seeded, endless order (`Dataset`), which does not depend on the others.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[Problem]], weights: Mapping[str, float], seed: int
    ) -> None:
        """Weights are above 0, one for each set."""
        self._names = sorted(sets)  # the order in which they are configured has no effect
        self.sets = {name: Dataset(sets[name], seed, name) for name in self._names}
        self.weights = {name: float(weights[name]) for name in self._names}
        self.seed = seed
        self.taken = 0
        """Problems taken so far."""
        self._ends = arc_ends(list(self.weights.values()))
        self._start = int.from_bytes(digest("sets", seed)[:8], "big")

    @property
    def fingerprint(self) -> dict[str, str]:
        """Identifies the problems of each set by content."""
        return {name: dataset.fingerprint for name, dataset in self.sets.items()}

    @property
    def problems(self) -> list[Problem]:
        return [problem for dataset in self.sets.values() for problem in dataset.problems]

    def fresh(self) -> "Mixture":
        return Mixture({name: of.problems for name, of in self.sets.items()}, self.weights, self.seed)

    def set_of(self, number: int) -> str:
        """The set of the prompt `number` (from 0)."""
        point = (self._start + number * GOLDEN_STEP) % CIRCLE
        return self._names[bisect_right(self._ends, point)]

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        taken = [self.sets[self.set_of(self.taken + step)].take(1)[0] for step in range(count)]
        self.taken += count
        return taken

    def put_back(self, count: int) -> None:
        """Undo the last `count` problems taken: the next `take` returns them again."""
        if not 0 <= count <= self.taken:
            raise ValueError(f"{count} problems cannot be put back after {self.taken} were taken")
        for _ in range(count):
            self.taken -= 1
            self.sets[self.set_of(self.taken)].put_back(1)

    def state(self) -> dict[str, Any]:
        """The position as JSON values: that of each set, and the weights to which they belong."""
        return {
            "seed": self.seed,
            "weights": self.weights,
            "sets": {name: dataset.state() for name, dataset in self.sets.items()},
        }

    def load_state(self, state: Any) -> None:
        """Resume exactly at `state`.

        Raises `UserError` if it is of another seed, other sets, weights or problems, and `ValueError` if it is no state.
        """
        if not isinstance(state, dict) or not isinstance(state.get("sets"), dict):
            raise ValueError("the position in data.sets is missing")
        if state["sets"].keys() != self.sets.keys() or state.get("weights") != self.weights:
            raise UserError(
                f"the checkpoint's training sets have the weights {_shown(state.get('weights'))} but data.sets has "
                f"{_shown(self.weights)}; restore them or start in a new run_dir"
            )
        for name, dataset in self.sets.items():
            dataset.load_state(state["sets"][name])
        self.taken = sum(dataset.taken for dataset in self.sets.values())
        counts = {name: dataset.taken for name, dataset in self.sets.items()}
        if counts != self._counts():
            raise ValueError(f"the positions in data.sets, {counts}, do not belong to one order")

    def _counts(self) -> dict[str, int]:
        """Prompts of each set among those taken."""
        counts = dict.fromkeys(self._names, 0)
        for number in range(self.taken):
            counts[self.set_of(number)] += 1
        return counts


def arc_ends(weights: Sequence[float]) -> list[int]:
    """The end of each set's arc on the circle, except the last. Exact, so that it is the same on every machine."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return [int(end * CIRCLE / total) for end in accumulate(exact[:-1])]


def _shown(weights: Any) -> str:
    if not isinstance(weights, dict):
        return "none"
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
