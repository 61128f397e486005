"""The scorer's process: tokenizer and rewards, and one call per group."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from megatron_fipo.scorer.limits import limit_memory, within
from megatron_fipo.scorer.protocol import (
    Failure,
    FailureKind,
    ScoreRequest,
    ScorerSettings,
)
from megatron_fipo.scorer.result import UnusableResultError, plain_score, plain_scores, total
from megatron_fipo.scorer.tokenizer import load_without_torch
from megatron_fipo.scorer.user_code import UserCall
from megatron_fipo.tasks.response_text import ResponseText, turns_of
from megatron_fipo.tasks.rewards import Term, load_terms
from megatron_fipo.tasks.task import Completion, Score, Turn

Result = TypeVar("Result")


class ScorerActor:
    """Implements `protocol.Scorer`."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._settings = settings

    def ready(self) -> None:
        settings = self._settings
        self._terms = {
            text: load_terms(text, settings.hook_folder, settings.reward) for text in settings.rewards
        }
        for reward in {
            id(term.reward): term.reward for terms in self._terms.values() for term in terms
        }.values():
            reward.prepare()
        self._text = ResponseText(load_without_torch(settings.model_path, settings.trust_remote_code)[0])
        limit_memory(settings.reward.memory_mb)

    def score(self, request: ScoreRequest) -> list[Score] | Failure:
        unscored = [response for response in request.responses if response.score is None]
        scores = self._score_by_reward(replace(request, responses=tuple(unscored))) if unscored else []
        if isinstance(scores, Failure):
            return scores
        by_reward = iter(scores)
        return [response.score or next(by_reward) for response in request.responses]

    def _score_by_reward(self, request: ScoreRequest) -> list[Score] | Failure:
        terms = self._terms[request.problem.task.reward]
        by_term = []
        for term in terms:
            scores = self._score_term(request, term)
            if isinstance(scores, Failure):
                return scores  # the group will not be used
            by_term.append(scores)
        try:
            return [total(terms, scores) for scores in zip(*by_term, strict=True)]
        except UnusableResultError as error:
            problem = request.problem
            reason = (
                f"the reward {problem.task.reward} {error} for a response to problem {problem.problem_id}"
            )
            return Failure(FailureKind.RESULT, reason)

    def score_and_count(self, request: ScoreRequest) -> tuple[list[Score] | Failure, int]:
        answer = self.score(request)
        return answer, sum(term.reward.take_retries() for term in self._terms[request.problem.task.reward])

    def _score_term(self, request: ScoreRequest, term: Term) -> list[Score] | Failure:
        """The scores of one reward, in order, or the first failure."""
        completions = [self._completion(request, index, term) for index in range(len(request.responses))]
        problem = request.problem
        row = f"problem {problem.problem_id}" + (
            f" of the set {problem.task.set_name}" if problem.task.set_name else ""
        )
        group = term.reward.score_group
        if group is not None:
            where = f"the {len(completions)} responses to {row}"
            return self._call(
                term, where, len(completions), lambda: plain_scores(group(completions), len(completions))
            )
        single = term.reward.score
        assert single is not None
        scores: list[Score] = []
        for index, completion in enumerate(completions):
            where = f"response {index + 1} of {len(completions)} to {row}"
            result = self._call(term, where, 1, lambda given=completion: plain_score(single(given)))  # type: ignore[misc]
            if isinstance(result, Failure):
                return result
            scores.append(result)
        return scores

    def _completion(self, request: ScoreRequest, index: int, term: Term) -> Completion:
        response = request.responses[index]
        text = self._text.ending(response.token_ids, term.reward.reads_last)
        turns: tuple[Turn, ...] = ()
        if request.problem.task.environment:
            turns = turns_of(self._text, response.token_ids, response.observations)
        return Completion(request.problem, text, response.token_ids, response.finish_reason, turns)

    def _call(
        self, term: Term, where: str, responses: int, function: Callable[[], Result]
    ) -> Result | Failure:
        """The result of a reward function and of reading it, which may run the reward's code too, or why there is none."""
        settings = self._settings.reward
        each = f" x {responses} responses" if responses > 1 else ""
        call = UserCall(
            f"the reward function {term.name}",
            f"for {where}",
            time_limit=f"reward.timeout_s = {settings.timeout_s:g} s{each}",
            memory_limit=f"reward.memory_mb = {settings.memory_mb} MB",
        )
        return call.result_of(lambda: within(settings.timeout_s * responses, function))
