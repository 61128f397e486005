"""Reports that every answer is wrong, with an example: wrong data or a wrong reward looks like hard problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.tasks.task import NO_ANSWER

REPORT_AFTER_GROUPS = 32
"""Groups without a right response, from the start of a run, after which it is reported."""
SHOWN_CHARACTERS = 160
"""Of the end of the response."""


@dataclass(frozen=True)
class WrongResponse:
    """A response that scored as wrong."""

    problem_id: str
    ground_truth: str
    response: str
    answer: str
    """As the scorer extracted it."""
    truncated: bool
    """At `rollout.max_response_length`."""

    def __str__(self) -> str:
        """One sentence for the user."""
        end = self.response[-SHOWN_CHARACTERS:].strip()
        cut = ", cut at rollout.max_response_length," if self.truncated else ""
        found = (
            "no valid answer was found in it"
            if self.answer == NO_ANSWER
            else f"the answer read is {self.answer!r:.80}"
        )
        return (
            f"for example, a response to problem {self.problem_id}{cut} ends in {end!r}; {found}, and the ground "
            f"truth is {self.ground_truth!r:.80}. If that response should be right, the cause is the data or "
            "reward.name, not the model"
        )


class AllWrongWatch:
    """Watches the groups of a run and reports once if none of the first ones has a right response."""

    def __init__(self, decode: Callable[[Sequence[int]], str], log: Callable[[str], None]) -> None:
        """`decode` turns token ids into text."""
        self._decode = decode
        self._log = log
        self._groups = 0
        self._reported = False
        self._last: Callable[[], WrongResponse] | None = None

    @property
    def example(self) -> WrongResponse | None:
        """A response of the last group that was all wrong."""
        return None if self._last is None else self._last()

    def all_wrong(
        self, problem_id: str, ground_truth: str, response_ids: Sequence[int], answer: str, finish_reason: str
    ) -> None:
        """A group finished without a right response; the arguments describe one of its responses."""
        self._last = lambda: WrongResponse(
            problem_id, ground_truth, self._decode(response_ids), answer, finish_reason == "length"
        )
        self._groups += 1
        if self._groups >= REPORT_AFTER_GROUPS and not self._reported:
            self._reported = True
            self._log(f"no response to the first {self._groups} prompts is right; {self.example}")

    def some_right(self) -> None:
        """A group finished with a right response, so nothing will be reported."""
        self._reported = True
