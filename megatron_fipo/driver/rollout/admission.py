"""The two rules of `rollout.unfinished`: when a prompt is started, and which groups a batch may contain.

A serial is a prompt's position in the order of the dataset. The rules have no state; the collector passes
what they depend on.
"""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

from megatron_fipo.config import RolloutConfig


class Admission(Protocol):
    """One rule."""

    in_order: ClassVar[bool]
    """Whether a batch is a prefix of the dataset's order.

    If so, a pause undoes the groups after it; without a pause they are counted with the next batch.
    """

    def may_start(self, started: int, waiting: int, unfinished: int) -> bool:
        """Whether another prompt may be started.

        `started` counts the prompts after the last batch, `waiting` and `unfinished` the groups in these
        states.
        """

    def ready(self, waiting: Collection[int], unfinished: Collection[int]) -> list[int]:
        """Which of the serials `waiting` the next batch may contain, in order."""


@dataclass(frozen=True)
class DropUnfinished:
    """Batches are consecutive parts of the dataset's order, independent of timing.

    `prompts_in_flight` prompts are started at once, later ones only if too few groups wait or are unfinished
    for a batch.
    """

    target_groups: int
    prompts_in_flight: int
    in_order: ClassVar[bool] = True

    def may_start(self, started: int, waiting: int, unfinished: int) -> bool:
        return started < self.prompts_in_flight or waiting + unfinished < self.target_groups

    def ready(self, waiting: Collection[int], unfinished: Collection[int]) -> list[int]:
        """Only groups with no unfinished group before them."""
        serials = sorted(waiting)
        return serials[: bisect_left(serials, min(unfinished))] if unfinished else serials


@dataclass(frozen=True)
class ContinueUnfinished:
    """Batches are the groups that finish first.

    Prompts are started until the groups of `buffered_batches` batches wait.
    """

    target_groups: int
    buffered_batches: int
    in_order: ClassVar[bool] = False

    def may_start(self, started: int, waiting: int, unfinished: int) -> bool:
        return waiting < self.target_groups * self.buffered_batches

    def ready(self, waiting: Collection[int], unfinished: Collection[int]) -> list[int]:
        """All of them."""
        return sorted(waiting)


def admission_for(rollout: RolloutConfig, target_groups: int) -> Admission:
    """The rule of `rollout.unfinished` for batches of `target_groups` groups."""
    if rollout.unfinished == "drop":
        return DropUnfinished(target_groups, rollout.prompts_in_flight)
    batches = rollout.max_staleness if rollout.mode == "fully_asynchronous" else 1
    return ContinueUnfinished(target_groups, batches)
