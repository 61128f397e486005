"""A pool in this process: responses depend on the requests' seeds, timing on a separate random generator.

The outcomes of prompts are scripted: serial `s` has outcome `outcomes[s % len(outcomes)]`.
"""

import random
from collections.abc import Sequence

import numpy as np

from megatron_fipo.driver.rollout.prompt_group import RequestResult, parse_request_id
from megatron_fipo.driver.scoring.pool import ScoreResult
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.task import Problem, Score
from tests.generations import generation

RIGHT, WRONG = 1, 2
MAX_LENGTH = 12
FAILING_INDEX = 1
"""Index of the response that fails, in a group with outcome `failed`."""
OUTCOMES = ("mixed", "right", "wrong", "failed", "unscored")


def dataset(size: int = 50) -> Dataset:
    return Dataset(
        [Problem(f"p{index}", (index,), f"prompt {index}", "x", "test") for index in range(size)], seed=3
    )


def score(response_text: str, problem: Problem, finish_reason: str) -> Score:
    right = response_text.endswith(f" {RIGHT}")
    return Score(1.0 if right else -1.0, float(right), answer=response_text)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    return " " + " ".join(map(str, ids))


class ToyScorers:
    """Scorers in this process: scores arrive in a random order, some later than the next poll."""

    def __init__(self, outcomes: Sequence[str], order: int) -> None:
        self.outcomes = outcomes
        self.submitted: list[int] = []
        """Serials of all groups, in order."""
        self.error: Exception | None = None
        """Raised by the next `poll`."""
        self.immediate = False
        """All scores arrive at the next poll."""
        self.silent = False
        """No score arrives at a poll."""
        self.waited: list[float] = []
        """The timeout of every call of `poll`."""
        self._rng = random.Random(~order)
        self._outstanding: list[ScoreRequest] = []

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    def submit(self, request: ScoreRequest) -> None:
        self.submitted.append(request.key)
        self._outstanding.append(request)

    def poll(self, timeout_s: float) -> list[ScoreResult]:
        self.waited.append(timeout_s)
        if self.error is not None:
            raise self.error
        if self.silent:
            return []
        least = len(self._outstanding) if self.immediate else 0
        return self._take(self._rng.randint(least, len(self._outstanding)))

    def finish(self) -> list[ScoreResult]:
        return self._take(len(self._outstanding))

    def _take(self, count: int) -> list[ScoreResult]:
        self._rng.shuffle(self._outstanding)
        taken, self._outstanding = self._outstanding[:count], self._outstanding[count:]
        return [self._result(request) for request in taken]

    def _result(self, request: ScoreRequest) -> ScoreResult:
        if self.outcomes[request.key % len(self.outcomes)] == "unscored":
            return ScoreResult(request, None)
        scores = [
            score(decode(response.token_ids), request.problem, response.finish_reason)
            for response in request.responses
        ]
        return ScoreResult(request, scores)


def complete_response(request_id: str, seed: int, outcome: str) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of the complete response to a request, over all calls."""
    rng = random.Random(seed)
    length = rng.randint(1, MAX_LENGTH)
    right = {"right": True, "wrong": False}.get(outcome, parse_request_id(request_id)[1] == 0)
    tokens = [rng.randint(3, 99) for _ in range(length - 1)] + [RIGHT if right else WRONG]
    return tokens, [-rng.random() for _ in range(length)]


class ToyPool:
    """`slots` requests run at a time, the others queue; a poll finishes some running ones at random."""

    def __init__(self, outcomes: Sequence[str], order: int = 0, slots: int = 8) -> None:
        self.outcomes = outcomes
        self.slots = slots
        self.version = 0
        self.submitted: list[list[GenerationRequest]] = []
        """Every call of `submit`."""
        self.limits: list[int] = []
        """The response limit of each call."""
        self.waited: list[float] = []
        """The timeout of every call of `poll`."""
        self.most_groups = 0
        """Largest number of groups outstanding at a time."""
        self.never_finishing: set[int] = set()
        """Serials of groups that run but do not finish."""
        self.scorers = ToyScorers(outcomes, order)
        self._rng = random.Random(order)
        self._outstanding: dict[str, GenerationRequest] = {}

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> None:
        self.limits.append(sampling.max_new_tokens)
        assert not self._outstanding.keys() & {request.request_id for request in requests}
        self.submitted.append(list(requests))
        self._outstanding |= {request.request_id: request for request in requests}
        self.most_groups = max(
            self.most_groups, len({parse_request_id(name)[0] for name in self._outstanding})
        )

    def poll(self, timeout_s: float) -> list[RequestResult]:
        self.waited.append(timeout_s)
        running = [
            n
            for n in list(self._outstanding)[: self.slots]
            if parse_request_id(n)[0] not in self.never_finishing
        ]
        finishing = self._rng.sample(running, self._rng.randint(min(1, len(running)), len(running)))
        return [self._finish(self._outstanding.pop(name)) for name in finishing]

    def abort(self) -> list[RequestResult]:
        """Running requests return unfinished, some of them finished; queued ones return empty."""
        running = [self._outstanding.pop(name) for name in list(self._outstanding)[: self.slots]]
        results = [self._cut(r) if self._rng.random() < 0.9 else self._finish(r) for r in running]
        results += [RequestResult(name, Generation.not_started(self.version)) for name in self._outstanding]
        self._outstanding.clear()
        self._rng.shuffle(results)
        return results

    def _finish(self, request: GenerationRequest) -> RequestResult:
        tokens, log_probs = self._rest(request)
        serial, index = parse_request_id(request.request_id)
        if self._outcome(serial) == "failed" and index == FAILING_INDEX:
            return RequestResult(request.request_id, None)
        return RequestResult(request.request_id, generation(tokens, log_probs, "stop", self.version))

    def _cut(self, request: GenerationRequest) -> RequestResult:
        tokens, log_probs = self._rest(request)
        end = self._rng.randrange(len(tokens))
        return RequestResult(
            request.request_id, generation(tokens[:end], log_probs[:end], "abort", self.version)
        )

    def _rest(self, request: GenerationRequest) -> tuple[list[int], list[float]]:
        tokens, log_probs = complete_response(
            request.request_id, request.seed, self._outcome(parse_request_id(request.request_id)[0])
        )
        start = len(request.prefix)
        assert tokens[:start] == request.prefix.tolist()
        return tokens[start:], log_probs[start:]

    def _outcome(self, serial: int) -> str:
        return self.outcomes[serial % len(self.outcomes)]
