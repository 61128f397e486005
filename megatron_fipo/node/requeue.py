"""Whether a job is started again after an attempt. Pure: the progress of the run is an argument."""

import signal
from dataclasses import dataclass, replace
from types import NoneType

from megatron_fipo.exit_codes import DONE, LOST, REQUEUED, SAVED, USER_ERROR

KILLED = 128 + signal.SIGKILL
"""How srun reports a command that was killed: by the kernel for its memory, or with its step."""


@dataclass(frozen=True)
class History:
    """What earlier attempts of a job tell the next one."""

    failures: int = 0
    """Attempts in a row, up to the last that has ended, without progress."""
    progress: str | None = None
    """What the run had saved when the open attempt began, as a text that changes with every save."""
    is_open: bool = False
    """An attempt has begun and not ended. If another begins, the scheduler has requeued the job by itself."""
    is_finished: bool = False
    """The command has exited with 0."""

    def __post_init__(self) -> None:
        """Raises TypeError for values of other types, as a damaged file may have."""
        for value, kind in (
            (self.failures, int),
            (self.progress, (str, NoneType)),
            (self.is_open, bool),
            (self.is_finished, bool),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} is not of type {kind}")


@dataclass(frozen=True)
class Decision:
    """The end of an attempt."""

    history: History
    requeue: bool
    code: int
    """Exit code of the job if it is not requeued. Never one that a scheduler may be configured to requeue by itself."""
    reason: str
    """One sentence."""


_ENDS: dict[int | None, str] = {
    SAVED: "the run was stopped with its state saved",
    LOST: "the run lost a part of the cluster",
}


def begin(history: History, progress: str | None, retries: int) -> Decision | History:
    """The history with a new attempt, or the decision that there is none."""
    if history.is_finished:
        return Decision(
            history, False, DONE, "the job had finished before it was requeued; nothing is left to do"
        )
    if history.is_open:
        ended = end(history, None, progress, retries)
        if not ended.requeue:
            return ended
        history = ended.history
    return replace(history, is_open=True, progress=progress)


def end(history: History, code: int | None, progress: str | None, retries: int) -> Decision:
    """What follows the open attempt, which exited with `code` (None: it ended with its node, and nobody saw how).

    The codes that mean "run the same command again" requeue the job, unless more than `retries` attempts in a row have
    ended without progress: those would go on for ever.
    """
    history = replace(history, is_open=False)
    if code == DONE:
        return Decision(replace(history, is_finished=True), False, DONE, "finished")
    if code not in (None, KILLED, *REQUEUED):
        assert code is not None
        return Decision(
            history, False, code, f"exit code {code} would come again, so the job is not requeued"
        )
    failures = 0 if progress != history.progress else history.failures + 1
    history = replace(history, failures=failures)
    what = _ENDS.get(code, "the attempt was killed")
    if failures > retries:
        return Decision(
            history,
            False,
            USER_ERROR,
            f"{what}, and {failures} attempt{'s' if failures > 1 else ''} in a row saved nothing new (at most {retries} are "
            "repeated), so the job is not requeued; read the last lines of driver.log, fix the cause or give the job more time, "
            "and submit it again",
        )
    count = f" ({failures} of at most {retries} without a new checkpoint)" if failures else ""
    return Decision(history, True, USER_ERROR, f"{what}, so the job is requeued{count}")
