"""The pool of scorers with real processes: a reward function that fails, hangs or kills its process costs its own group."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_fipo.config import HttpReward, RewardConfig
from megatron_fipo.driver.scoring.pool import ScorerCounts, ScoreResult, ScorerPool
from megatron_fipo.driver.workers import queue
from megatron_fipo.driver.workers.failures import LEAST_FAILURES
from megatron_fipo.driver.workers.pool import MAX_FAILED_STARTS
from megatron_fipo.errors import UserError
from megatron_fipo.scorer.actor import ScorerActor
from tests.scorer.faulty import GOOD, ROOT, SETTINGS, FaultyScorer, Unloadable
from tests.scorer.requests import request


class Pools:
    """Starts pools that end with the test."""

    def __init__(self) -> None:
        self.logged: list[str] = []
        self._pools: list[ScorerPool] = []

    def start(
        self, size: int = 1, actor_class: type = FaultyScorer, share: float = 1.0, **settings: object
    ) -> ScorerPool:
        pool = ScorerPool(
            actor_class,
            replace(SETTINGS, **settings),  # type: ignore[arg-type]
            size,
            max_failure_share=share,
            log=self.logged.append,
        )
        self._pools.append(pool)
        return pool

    def end(self) -> None:
        for pool in self._pools:
            pool.shutdown()


@pytest.fixture
def pools(cluster: None) -> Iterator[Pools]:
    started = Pools()
    yield started
    started.end()


def poll_for_ever(pool: ScorerPool, results: list[ScoreResult]) -> None:
    while True:
        results += pool.poll(1.0)


def test_failures_cost_their_own_group_and_a_lost_process_one_retry(pools, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(queue, "GRACE_S", 2.0)
    pool = pools.start(size=2)
    always = ["nan", "raise", "slow", "memory", "hang", "die"]
    once = [f"{name}@{tmp_path / name}" for name in ("slow", "memory", "hang", "die")]
    behaviours = ["good", *always, "good", *once, "good"]
    scores = pool.score([request(key, 2, truth) for key, truth in enumerate(behaviours)])
    assert scores == [None if truth in always else [GOOD, GOOD] for truth in behaviours]
    assert pool.outstanding == 0
    # nan and raise fail once, the other four twice, and each of `once` once
    assert pool.take_counts() == ScorerCounts(retries=8, restarts=12, failures=14)
    assert pool.take_counts() == ScorerCounts()
    kinds = ["gave the reward nan", "raised KeyError", "took more", "needed more", "did not answer", "died"]
    assert len(pools.logged) == len(kinds)
    assert all(any(kind in line and "problem p" in line for line in pools.logged) for kind in kinds)


def test_too_many_failures_end_the_run_and_lose_no_result(pools):
    pool = pools.start(share=0.2)
    count = LEAST_FAILURES + 5
    for key in range(count):
        pool.submit(request(key, truth="good" if key < 2 else "nan"))
    results: list[ScoreResult] = []
    with pytest.raises(
        UserError, match=r"10 of the last 12 groups .*gave the reward nan .*problem p11; correct"
    ):
        poll_for_ever(pool, results)
    results += pool.finish()
    assert sorted(result.request.key for result in results) == list(range(count))
    assert [result.scores for result in results if result.request.key < 2] == [[GOOD], [GOOD]]
    assert len(pools.logged) == 1


@pytest.mark.parametrize(
    ("actor_class", "settings", "words"),
    [
        (FaultyScorer, {"model_path": "/nowhere"}, "/nowhere"),
        (
            Unloadable,
            {},
            f"could not start {MAX_FAILED_STARTS} times in a row; the last reason: scorer 0 died",
        ),
    ],
)
def test_scorers_that_cannot_load_end_the_run(pools, actor_class: type, settings, words):
    pool = pools.start(actor_class=actor_class, **settings)
    pool.submit(request(0))
    with pytest.raises(UserError, match=words):
        poll_for_ever(pool, [])
    (result,) = pool.finish()
    assert result.scores is None


def test_an_interrupted_evaluation_leaves_nothing_outstanding(pools):
    pool = pools.start()
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.score([request(key, truth="good") for key in range(50)], check)
    assert pool.outstanding == 0
    assert pool.score([request(0, truth="good")]) == [[GOOD]]


def eventually(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


def test_scorers_end_with_the_pool(pools):
    pool = pools.start(size=2)
    assert pool.score([request(0, truth="good")]) == [[GOOD]]
    named = [
        p for p in psutil.process_iter(["cmdline"]) if "FaultyScorer" in " ".join(p.info["cmdline"] or ())
    ]
    assert len(named) >= 2
    pool.shutdown()
    eventually(lambda: not any(process.is_running() for process in named))


def test_a_judge_scores_and_its_failures_are_counted(pools):
    judge = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/tasks/http/judge_server.py")], stdout=subprocess.PIPE, text=True
    )
    assert judge.stdout is not None
    url = f"http://127.0.0.1:{int(judge.stdout.readline())}/"
    reward = RewardConfig(timeout_s=60.0, http=HttpReward(url=url, timeout_s=10.0, backoff_s=0.01))
    try:
        pool = pools.start(actor_class=ScorerActor, rewards=("http",), reward=reward)
        behaviours = ["full", "500,text,full", "404"]
        full, repeated, missing = pool.score(
            [request(key, 2, truth, reward="http") for key, truth in enumerate(behaviours)]
        )
    finally:
        judge.kill()
        judge.wait()
    assert missing is None
    for scores in (full, repeated):
        assert scores is not None
        assert [(score.reward, score.accuracy) for score in scores] == [(0.5, 1.0)] * 2
    assert pool.take_counts() == ScorerCounts(failures=1, judge_retries=2, judge_failures=1)
    assert any("it answers with status 404" in line for line in pools.logged)


def test_a_scorer_without_the_token_of_its_judge_says_so(pools):
    http = HttpReward(url="http://127.0.0.1:9/", token_variable="NO_SUCH_JUDGE_TOKEN")
    pool = pools.start(
        actor_class=ScorerActor, rewards=("http",), reward=RewardConfig(timeout_s=200.0, http=http)
    )
    with pytest.raises(
        UserError, match="token_variable=NO_SUCH_JUDGE_TOKEN is not set in the environment of a scorer"
    ):
        pool.score([request(0, reward="http")])


def test_answers_are_run_in_a_scorer(pools):
    pool = pools.start(actor_class=ScorerActor, rewards=("code",), reward=RewardConfig())
    truth = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    (scores,) = pool.score([request(0, 2, truth, reward="code")])
    assert scores is not None
    assert [(score.reward, score.extra["tests"]) for score in scores] == [(0.0, 1)] * 2
