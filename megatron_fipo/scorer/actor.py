"""The scorer's process: tokenizer and reward, and one call per group."""

import sys
from typing import Any

from megatron_fipo.families.registry import read_architecture
from megatron_fipo.scorer.limits import TimeLimitError, limit_memory, within
from megatron_fipo.scorer.protocol import (
    Failure,
    FailureKind,
    ScoreRequest,
    ScorerSettings,
)
from megatron_fipo.scorer.result import UnusableResultError, plain_score, shown_error
from megatron_fipo.tasks.registry import reward
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.tasks.task import Score


class ScorerActor:
    """Implements `protocol.Scorer`."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._settings = settings

    def ready(self) -> None:
        settings = self._settings
        self._reward = reward(settings.reward_name)
        if not settings.trust_remote_code:
            # transformers imports torch if it finds it. Without it this process starts twice as fast and
            # takes less than half of the memory.
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        self._text = ResponseText(self._load_tokenizer())
        limit_memory(settings.memory_mb)

    def score(self, request: ScoreRequest) -> list[Score] | Failure:
        scores: list[Score] = []
        for index in range(len(request.responses)):
            result = self._score_response(request, index)
            if isinstance(result, Failure):
                return result  # the group will not be used
            scores.append(result)
        return scores

    def _load_tokenizer(self) -> Any:
        from megatron_fipo.checkpoint.tokenizer import load_tokenizer

        folder = self._settings.model_path
        tokenizer, _ = load_tokenizer(
            folder, self._settings.trust_remote_code, read_architecture(folder).vocab_size
        )
        return tokenizer

    def _score_response(self, request: ScoreRequest, index: int) -> Score | Failure:
        settings, problem, response = self._settings, request.problem, request.responses[index]

        def failure(kind: FailureKind, what: str) -> Failure:
            where = f"response {index + 1} of {len(request.responses)} to problem {problem.problem_id}"
            return Failure(kind, f"the reward function {settings.reward_name} {what} for {where}")

        def score() -> Score:
            text = self._text.ending(response.token_ids, self._reward.reads_last)
            # Reading the result may run the reward's code too.
            return plain_score(self._reward.score(text, problem, response.finish_reason))

        try:
            return within(settings.timeout_s, score)
        except TimeLimitError:
            return failure(FailureKind.TIME, f"took more than reward.timeout_s = {settings.timeout_s:g} s")
        except MemoryError:
            return failure(FailureKind.MEMORY, f"needed more than reward.memory_mb = {settings.memory_mb} MB")
        except UnusableResultError as error:
            return failure(FailureKind.RESULT, str(error))
        except BaseException as error:  # a reward function may raise SystemExit or KeyboardInterrupt
            return failure(FailureKind.RAISED, f"raised {shown_error(error)}")
