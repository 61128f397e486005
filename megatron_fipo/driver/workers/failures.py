"""What could not be answered: logged once per kind, and the sentence with which a run ends if it is too much."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_fipo.errors import UserError
from megatron_fipo.scorer.protocol import Failure, FailureKind

WINDOW = 200
"""Groups or turns answered last, of which a share may fail."""
LEAST_FAILURES = 10
"""Failures among them below which a run continues whatever their share is."""


@dataclass(frozen=True)
class Wording:
    """How messages name what failed."""

    section: str
    """Of the settings."""
    code: str
    """The user's code."""
    failed: str
    """What too many failures were: the rest of a sentence that begins with their number."""

    def fix(self, kind: FailureKind) -> str:
        return {
            FailureKind.RAISED: f"correct the {self.code}",
            FailureKind.RESULT: f"correct the {self.code}",
            FailureKind.TIME: f"make the {self.code} faster, load what it needs when its module is imported, or raise "
            f"{self.section}.timeout_s",
            FailureKind.MEMORY: f"correct the {self.code} or raise {self.section}.memory_mb",
            FailureKind.UNAVAILABLE: f"check the service that the {self.code} needs",
            FailureKind.HUNG: f"correct the {self.code}, which does not return",
            FailureKind.DIED: f"correct the {self.code}, which ends its process, or free memory",
        }[kind]


class FailureWatch:
    """Told of each group or turn that was answered or could not be."""

    def __init__(self, max_share: float, log: Callable[[str], None], wording: Wording) -> None:
        """`log` receives one sentence for the first failure of each kind, and the traceback of the user's code."""
        self._wording = wording
        self._max_share = max_share
        self._log = log
        self._logged: set[FailureKind] = set()
        self._window: deque[FailureKind | None] = deque(maxlen=WINDOW)
        """Why each of the last ones failed; None if it did not."""
        self._last: Failure | None = None

    def happened(self, failure: Failure) -> None:
        """A call failed, whether or not there is another."""
        if failure.kind not in self._logged:
            self._logged.add(failure.kind)
            trace = f"\n{failure.trace}" if failure.trace else ""
            self._log(
                f"{failure.reason}; further failures of this kind are not shown; groups that they cost are counted in "
                f"groups/unscored, problems of an evaluation in evaluation/failed{trace}"
            )

    def ended(self, failure: Failure | None) -> None:
        """A group or turn was answered (None) or could not be."""
        self._window.append(None if failure is None else failure.kind)
        self._last = failure or self._last

    def raise_if_too_many(self) -> None:
        """Raises `UserError`, with the last traceback, if the share of failures is above the limit."""
        failures = len(self._window) - self._window.count(None)
        if self._last is None or failures < LEAST_FAILURES:
            return
        if failures <= self._max_share * len(self._window):
            return
        cause = ""
        if self._window.count(FailureKind.TIME) == len(self._window):
            cause = f"all exceeded the limit, which is probably too low for this {self._wording.code}; "
        error = UserError(
            f"{failures} of the last {len(self._window)} {self._wording.failed}, above "
            f"{self._wording.section}.max_failure_share = {self._max_share:g}; the last reason: {self._last.reason}; "
            f"{cause}{self._wording.fix(self._last.kind)}, then run the command again with the correction; a training run resumes"
        )
        error.trace = self._last.trace
        raise error
