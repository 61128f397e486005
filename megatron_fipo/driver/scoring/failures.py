"""What could not be scored: logged once per kind, and the sentence with which a run ends if it is too much."""

from collections import deque
from collections.abc import Callable

from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure, FailureKind

WINDOW = 200
"""Groups scored last, of which a share may fail."""
LEAST_FAILURES = 10
"""Failures among them below which a run continues whatever their share is."""
_FIX = {
    FailureKind.RAISED: "correct the reward function",
    FailureKind.RESULT: "correct the reward function",
    FailureKind.TIME: "make the reward function faster or raise reward.timeout_s",
    FailureKind.MEMORY: "correct the reward function or raise reward.memory_mb",
    FailureKind.HUNG: "correct the reward function, which does not return",
    FailureKind.DIED: "correct the reward function, which ends its process, or free memory",
}


class FailureWatch:
    """Told of each group that was scored or could not be."""

    def __init__(self, max_share: float, log: Callable[[str], None]) -> None:
        """`log` receives one sentence for the first failure of each kind."""
        self._max_share = max_share
        self._log = log
        self._logged: set[FailureKind] = set()
        self._window: deque[FailureKind | None] = deque(maxlen=WINDOW)
        """Why each of the last groups failed; None if it was scored."""
        self._last: Failure | None = None

    def happened(self, failure: Failure) -> None:
        """A call failed, whether or not its group is scored again."""
        if failure.kind not in self._logged:
            self._logged.add(failure.kind)
            self._log(
                f"{failure.reason}; further failures of this kind are not shown; groups that they cost are counted in "
                "groups/unscored, problems of an evaluation in evaluation/failed"
            )

    def ended(self, failure: Failure | None) -> None:
        """A group was scored (None) or could not be."""
        self._window.append(None if failure is None else failure.kind)
        self._last = failure or self._last

    def raise_if_too_many(self) -> None:
        """Raises `UserError` if the share of failures is above the limit."""
        failures = len(self._window) - self._window.count(None)
        if self._last is None or failures < LEAST_FAILURES:
            return
        if failures <= self._max_share * len(self._window):
            return
        cause = ""
        if self._window.count(FailureKind.TIME) == len(self._window):
            cause = "all exceeded the limit, which is probably too low for this reward function; "
        raise UserError(
            f"{failures} of the last {len(self._window)} groups could not be scored, above "
            f"reward.max_failure_share = {self._max_share:g}; the last reason: {self._last.reason}; "
            f"{cause}{_FIX[self._last.kind]}, then run the command again with the correction; a training run resumes"
        )
