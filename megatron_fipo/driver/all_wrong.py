"""Reports that every answer is wrong, with an example: wrong data or a wrong reward looks like hard problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import NO_ANSWER, Decode, Score

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
    """As the reward function extracted it."""
    truncated: bool
    """At `rollout.max_response_length`."""

    def __str__(self) -> str:
        """One sentence for the user."""
        end = self.response[-SHOWN_CHARACTERS:].strip()
        cut = ", cut at its limit of tokens," if self.truncated else ""
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

    def __init__(self, decode: Decode, log: Callable[[str], None]) -> None:
        """`decode` turns token ids into text."""
        self._decode = decode
        self._log = log
        self._groups = 0
        self._reported = False
        self._last: tuple[ScoreRequest, Score] | None = None

    @property
    def example(self) -> WrongResponse | None:
        """The last response of the last group that was all wrong."""
        if self._last is None:
            return None
        request, score = self._last
        response = request.responses[-1]
        return WrongResponse(
            request.problem.problem_id,
            request.problem.ground_truth,
            self._decode(response.token_ids),
            score.answer,
            response.finish_reason == "length",
        )

    def finished(self, request: ScoreRequest, scores: Sequence[Score]) -> None:
        """The responses to a problem are scored. After one that is right, nothing will be reported."""
        if any(score.accuracy > 0 for score in scores):
            self._reported = True
            return
        self._last = request, scores[-1]
        self._groups += 1
        if self._groups >= REPORT_AFTER_GROUPS and not self._reported:
            self._reported = True
            self._log(f"no response to the first {self._groups} prompts is right; {self.example}")
