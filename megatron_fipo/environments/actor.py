"""The process of environments: their instances, and one call for turns of several episodes."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megatron_fipo.environments.load import KEY, MakeEnvironment, load_environment
from megatron_fipo.environments.observation import ObservationEncoder
from megatron_fipo.environments.protocol import (
    MAX_ATTEMPTS,
    Answers,
    TurnAnswer,
    TurnRequest,
    TurnsRequest,
    WorkerSettings,
)
from megatron_fipo.hooks import HookError, own_trace
from megatron_fipo.scorer.limits import TimeLimitError, limit_memory, within
from megatron_fipo.scorer.protocol import Failure
from megatron_fipo.scorer.result import UnusableResultError, plain_score, shown_error
from megatron_fipo.scorer.tokenizer import load_without_torch
from megatron_fipo.scorer.user_code import UserCall
from megatron_fipo.tasks.environment import Done, Environment, Episode
from megatron_fipo.tasks.response_text import ResponseText, turns_of
from megatron_fipo.tasks.task import Problem, Turn

INSTANCES = 4096
"""Episodes whose environments are kept. One that is not is replayed; episodes that the driver drops end here alone."""

Result = TypeVar("Result")


@dataclass
class _Instance:
    """The environment of one episode."""

    environment: Environment
    seen: bytes
    """Identifies the turns that it has answered."""


class EnvironmentActor:
    """Implements `protocol.EnvironmentWorker`."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._instances: OrderedDict[str, _Instance] = OrderedDict()
        """By episode; those used last are last."""

    def ready(self) -> None:
        settings = self._settings
        self._makers: dict[str, MakeEnvironment] = {
            path: load_environment(path, settings.hook_folder) for path in settings.samples
        }
        tokenizer, vocab_size = load_without_torch(settings.model_path, settings.trust_remote_code)
        self._text = ResponseText(tokenizer)
        self._encode = ObservationEncoder(tokenizer, vocab_size, settings.max_observation_tokens)
        limit_memory(settings.memory_mb)
        for path, problem in settings.samples.items():
            self._try(path, problem)

    def answer(self, request: TurnsRequest) -> Answers | Failure:
        answers: list[TurnAnswer | Failure] = []
        for turn in request.turns:
            for _ in range(MAX_ATTEMPTS):
                answer = self._answer(turn)
                if not isinstance(answer, Failure):
                    break
                if not answer.kind.repeatable:
                    return answer
            answers.append(answer)
        return answers

    def _try(self, path: str, problem: Problem) -> None:
        """Answer an empty response, which an environment must be able to."""
        try:
            environment = self._makers[path]()
            self._call(lambda: environment.reset(problem))
            self._step(environment, Episode(problem, (Turn("", ""),)), None)
        except BaseException as error:  # an environment may raise anything
            slow = isinstance(error, TimeLimitError)
            what = (
                f"took more than {self._settings.timeout_s:g} s" if slow else f"raised {shown_error(error)}"
            )
            if isinstance(error, UnusableResultError):
                what = str(error)
            raise HookError(
                f"{KEY}={path}: tried with an empty response to problem {problem.problem_id}, it {what}; correct it, since "
                "a model may write anything",
                own_trace(error),
            ) from None

    # -- one turn --------------------------------------------------------------------------------------------

    def _answer(self, turn: TurnRequest) -> TurnAnswer | Failure:
        """Continue the episode's instance, or one that replays its turns. After a failure the instance is gone."""
        settings = self._settings
        call = UserCall(
            f"the environment {turn.problem.task.environment}",
            f"in turn {len(turn.observations) + 1} of a response to problem {turn.problem.problem_id}",
            time_limit=f"environment.timeout_s = {settings.timeout_s:g} s",
            memory_limit=f"environment.memory_mb = {settings.memory_mb} MB",
        )
        return call.result_of(lambda: self._answer_turn(turn))

    def _answer_turn(self, turn: TurnRequest) -> TurnAnswer:
        complete = turns_of(self._text, turn.token_ids, turn.observations)
        instance = self._instances.pop(turn.episode_id, None)
        if instance is None or instance.seen != _seen(turn):
            instance = self._replayed(turn, complete)
        answer = self._step(instance.environment, Episode(turn.problem, complete), int(turn.token_ids[-1]))
        if answer.finish_reason is None and len(answer.observation) > turn.space:
            return TurnAnswer("length")
        if answer.finish_reason is None:
            instance.seen = _digest(turn.token_ids, answer.observation)
            self._instances[turn.episode_id] = instance
            if len(self._instances) > INSTANCES:
                self._instances.popitem(last=False)
        return answer

    def _replayed(self, turn: TurnRequest, complete: tuple[Turn, ...]) -> _Instance:
        """A new instance that has seen all turns but the last."""
        environment = self._call(self._makers[turn.problem.task.environment])
        self._call(lambda: environment.reset(turn.problem))
        for count in range(1, len(complete)):
            seen = (*complete[: count - 1], Turn(complete[count - 1].response, ""))
            self._call(lambda seen=seen: environment.step(Episode(turn.problem, seen)))  # type: ignore[misc]
        return _Instance(environment, _seen(turn))

    def _step(self, environment: Environment, episode: Episode, last_token: int | None) -> TurnAnswer:
        """Reading what `step` returned may run its code too, so it is within the limits."""
        return self._call(lambda: self._plain(environment.step(episode), last_token))

    def _call(self, function: Callable[[], Result]) -> Result:
        return within(self._settings.timeout_s, function)

    def _plain(self, answer: Any, last_token: int | None) -> TurnAnswer:
        if answer is None:
            answer = Done()
        if isinstance(answer, Done):
            return TurnAnswer("stop", score=None if answer.score is None else plain_score(answer.score))
        observation, truncated = self._encode(answer, last_token)
        return TurnAnswer(None, observation, truncated=truncated)


def _seen(turn: TurnRequest) -> bytes:
    """Identifies the turns that were answered before the last one."""
    end = turn.observations[-1][1] if turn.observations else 0
    return _digest(turn.token_ids[:end])


def _digest(*token_ids: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in token_ids:
        digest.update(ids.tobytes())
    return digest.digest()
