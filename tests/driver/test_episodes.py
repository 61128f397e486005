"""Episodes end exactly once, whatever engines and environments do and when, and their tokens do not depend on it."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.driver.rollout.episodes import Episodes
from megatron_fipo.driver.rollout.prompt_group import (
    EpisodeGeneration,
    EpisodeRequest,
    PromptGroup,
    RequestResult,
    Response,
)
from megatron_fipo.driver.rollout.saved_groups import pack_groups, unpack_groups
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.environments.protocol import TurnAnswer, TurnRequest
from megatron_fipo.tasks.task import Problem, Score, TaskSettings
from tests.generations import plain

LIMIT, MAX_TURNS = 24, 5
SAMPLING = SamplingParams(1.0, 1.0, LIMIT, stop=("<",), stop_token_ids=(1,))
PROBLEM = Problem("p", (7,), "prompt", "x", "test", task=TaskSettings(environment="m:step"))
STOP, OBSERVED = 2, 50
"""The token that ends a turn; tokens of observations are at least `OBSERVED`."""


def token(seed: int, position: int) -> int:
    """The policy: the token at a position of a response depends on the seed alone."""
    return random.Random(f"{seed} {position}").choice([STOP, 3, 4, 5, 6])


def log_prob(token_id: int) -> np.float32:
    return np.float32(-0.1 * token_id)


def routes_of(start: int, end: int) -> np.ndarray:
    """The engine's routes of some positions, which tell the positions."""
    return np.arange(start, end, dtype=np.uint8)[:, None, None] * np.array([[1, 2]], dtype=np.uint8)


def answer_to(turn: TurnRequest) -> TurnAnswer | None:
    """The environment, a function of the turn; it fails, ends or continues the episode."""
    rng = random.Random(turn.token_ids.tobytes())
    what = rng.choice(["fail", "end", "score", "observe", "observe", "observe", "observe"])
    if what == "fail":
        return None
    if what == "end":
        return TurnAnswer("stop")
    if what == "score":
        return TurnAnswer("stop", score=Score(0.5, 1.0))
    observation = np.array([rng.randint(OBSERVED, 99) for _ in range(rng.randint(1, 4))], np.int32)
    return TurnAnswer("length") if len(observation) > turn.space else TurnAnswer(None, observation)


def alone(request: EpisodeRequest) -> tuple[list[int], str | None]:
    """The response and its finish reason (None: the environment fails), by a loop without interruptions."""
    ids: list[int] = []
    observations: list[tuple[int, int]] = []
    while True:
        ids.append(token(request.seed, len(ids)))
        if ids[-1] != STOP:
            if len(ids) == LIMIT:
                return ids, "length"
            continue
        space = 0 if len(observations) + 1 >= MAX_TURNS else max(0, LIMIT - len(ids) - 1)
        turn = TurnRequest("", PROBLEM, np.array(ids, np.int32), tuple(observations), space)
        answer = answer_to(turn)
        if answer is None or answer.finish_reason is not None:
            return ids, None if answer is None else answer.finish_reason
        observations.append((len(ids), len(ids) + len(answer.observation)))
        ids += answer.observation.tolist()


class World:
    """Engines and environments that answer in the order and at the times that `choose` gives."""

    def __init__(self, episodes: Episodes, choose: random.Random, failing: float) -> None:
        self.episodes = episodes
        self.choose = choose
        self.failing = failing
        self.calls: list[list[GenerationRequest]] = []
        self.turns: list[TurnRequest] = []
        self.submitted: list[list[str]] = []

    def send(self) -> None:
        for requests, sampling in self.episodes.take_submissions():
            assert (sampling.stop, sampling.stop_token_ids) == (("<", "="), (1, STOP))
            assert all(len(request.prefix) < LIMIT for request in requests)
            assert all(type(request) is GenerationRequest for request in requests), "engines get no problems"
            self.calls.append(requests)
            self.submitted.append([request.request_id for request in requests])
        self.turns += self.episodes.take_turns()

    def step(self) -> None:
        """One engine call or one turn ends."""
        if self.calls and (not self.turns or self.choose.random() < 0.5):
            self.end_call(aborted=False)
        elif self.turns:
            turn = self.turns.pop(self.choose.randrange(len(self.turns)))
            self.episodes.answered(turn.episode_id, answer_to(turn))
        self.send()

    def end_call(self, aborted: bool) -> None:
        for request in self.calls.pop(self.choose.randrange(len(self.calls))):
            ids: list[int] = []
            start = len(request.prefix)
            reason = "abort"
            for position in range(start, LIMIT):
                if aborted and self.choose.random() < 0.3:
                    break
                ids.append(token(request.seed, position))
                if ids[-1] == STOP or position == LIMIT - 1:
                    reason = "stop" if ids[-1] == STOP else "length"
                    break
            computed = len(request.prompt_ids) + len(request.prefix) + len(ids) - 1
            generation: Generation | None = Generation(
                np.array(ids, np.int32),
                np.array([log_prob(i) for i in ids], np.float32),
                reason,
                3,
                routes_of(request.routed, computed),
            )
            if self.choose.random() < self.failing:
                generation = None
            self.episodes.generated(RequestResult(request.request_id, generation))

    def abort(self) -> None:
        """Engines return what they have; environments finish."""
        self.episodes.begin_abort()
        while self.calls:
            self.end_call(aborted=True)
        self.send()
        for turn in self.turns:
            self.episodes.answered(turn.episode_id, answer_to(turn))
        self.turns.clear()
        self.send()
        assert not self.calls
        self.episodes.end_abort()


def make_episodes(lockstep: bool) -> Episodes:
    return Episodes(max_turns=MAX_TURNS, stop=("=",), stop_token_ids=(STOP,), lockstep=lockstep)


def check(response: Response, expected: list[int]) -> None:
    """Observations are where the environment's tokens are, and nowhere else; the mask and log-probs agree."""
    ids = response.token_ids.tolist()
    assert ids == expected[: len(ids)]
    observed = [i >= OBSERVED for i in ids]
    assert response.mask.tolist() == [int(not o) for o in observed]
    assert response.log_probs.tolist() == [
        0.0 if o else log_prob(i) for i, o in zip(ids, observed, strict=True)
    ]
    assert response.sampled_tokens == observed.count(False)
    routes = response.routes
    if response.finish_reason is not None:
        assert routes is not None
        assert len(routes) == len(PROBLEM.prompt_ids) + len(ids) - 1
    if routes is not None:
        assert np.array_equal(routes, routes_of(0, len(routes)))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_every_episode_ends_once_with_its_own_tokens(seed, count, lockstep, failing, aborts):
    """Aborted episodes resume from their prefix, through a checkpoint, and end as those that were never interrupted."""
    episodes = make_episodes(lockstep)
    world = World(episodes, random.Random(seed), failing)
    group = PromptGroup(seed, PROBLEM, [Response() for _ in range(count)])
    expected = {r.request_id: alone(r) for r in group.requests(1)}  # type: ignore[arg-type]
    failed: set[str] = set()

    def take() -> None:
        for result in episodes.take_results():
            index = int(result.request_id.rpartition("/")[2])
            assert group.responses[index].finish_reason is None
            assert result.request_id not in failed
            ids, reason = expected[result.request_id]
            if result.generation is None:
                assert failing or (reason is None and result.environment_failed)
                failed.add(result.request_id)
                continue
            assert isinstance(result.generation, EpisodeGeneration)
            before = group.responses[index].sampled_tokens
            group.responses[index].add(result.generation)
            check(group.responses[index], ids)
            assert group.responses[index].sampled_tokens == before + result.sampled_tokens
            if result.generation.finish_reason != "abort":
                assert (group.responses[index].token_ids.tolist(), result.generation.finish_reason) == (
                    ids,
                    reason,
                )

    for steps in [*aborts, None]:
        requests = [request for request in group.requests(1) if request.request_id not in failed]
        episodes.submit(requests, SAMPLING)  # type: ignore[arg-type]
        world.send()
        while episodes.outstanding and steps != 0:
            world.step()
            take()
            steps = None if steps is None else steps - 1
        if episodes.outstanding:
            world.abort()
            take()
        assert episodes.outstanding == 0
        (restored, _), *_ = unpack_groups(*pack_groups([(group, None)]), {"p": PROBLEM})
        assert plain(restored.responses) == plain(group.responses)
        group = restored
    for index, response in enumerate(group.responses):
        assert (response.finish_reason is None) == (f"{group.group_id}/{index}" in failed)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_in_lockstep_the_calls_do_not_depend_on_timing(seed, timing):
    """Which requests share a call, and in which order, is the same whatever answers first."""
    calls = []
    for choice in (seed, timing):
        episodes = make_episodes(lockstep=True)
        world = World(episodes, random.Random(choice), failing=0.0)
        for serial in range(3):
            requests = PromptGroup(serial, PROBLEM, [Response() for _ in range(4)]).requests(1)
            episodes.submit(requests, SAMPLING)  # type: ignore[arg-type]
        world.send()
        while episodes.outstanding:
            world.step()
            episodes.take_results()
        calls.append(sorted(world.submitted))
    assert calls[0] == calls[1]


def test_an_id_is_outstanding_once():
    episodes = make_episodes(lockstep=False)
    requests = PromptGroup(0, PROBLEM, [Response()]).requests(1)
    episodes.submit(requests, SAMPLING)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already outstanding"):
        episodes.submit(requests, SAMPLING)  # type: ignore[arg-type]
