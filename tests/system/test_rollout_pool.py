"""The engine pool with real actors: faults lose work, but never change results."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_fipo.config import RolloutConfig
from megatron_fipo.driver.rollout.engine_actors import COLOCATED_GPU_SHARE, EngineActors
from megatron_fipo.driver.rollout.losses import PoolCounts
from megatron_fipo.driver.rollout.pool import EnginePool, RequestResult
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError
from tests.engine.tiny import save_model, some_group, some_requests
from tests.generations import ids, plain
from tests.system.runs import LONGEST_S
from tests.system.troubled_engine import HEALTH_S, SAMPLING, STALL_S, TrainerRank, TroubledEngine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in their weights."""
    return [save_model(tmp_path_factory.mktemp("model"), seed) for seed in (0, 9)]


@pytest.fixture(scope="module")
def answers(folders: list[Path]) -> list[dict[str, Generation]]:
    """The replies of one engine in this process with the weights of each folder."""
    result = []
    for folder in folders:
        engine = LocalEngine(str(folder), "float32")
        engine.ready()
        requests = some_requests()
        replies = engine.generate(requests, SAMPLING)
        result.append({request.request_id: reply for request, reply in zip(requests, replies, strict=True)})
    return result


def tokens(generations: dict[str, Generation]) -> dict[str, tuple[int, ...]]:
    return {request_id: ids(generation) for request_id, generation in generations.items()}


@pytest.fixture(scope="module")
def trainer(cluster: None) -> Iterator[Any]:
    remote: Any = ray.remote(TrainerRank)
    actor = remote.options(num_cpus=1).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def shared_pool(cluster: None, folders: list[Path]) -> Iterator[EnginePool]:
    """Two engines for most tests, since starting one takes seconds. They start without weights."""
    rollout = RolloutConfig(
        num_engines=2,
        max_retries=3,
        timeout_s=120.0,
        stall_timeout_s=STALL_S,
        health_timeout_s=HEALTH_S,
        max_restarts=20,
    )
    kwargs = {"model_path": str(folders[0]), "dtype": "float32", "load_weights": False}
    pool = EnginePool(TroubledEngine, kwargs, rollout, vocab_size=1000, gpus_per_engine=0, keep_batches=False)
    yield pool
    pool.shutdown()


@pytest.fixture
def pool(shared_pool: EnginePool, trainer: Any, folders: list[Path]) -> EnginePool:
    """Both engines serve the second folder's weights as version 2, and nothing is outstanding."""
    shared_pool.loaded(wait=True)
    push(shared_pool, trainer, shared_pool.stale(), folders[1], 2)
    shared_pool.take_counts()
    assert shared_pool.outstanding == 0
    return shared_pool


def push(pool: EnginePool, trainer: Any, engines: dict[int, Any], folder: Path, version: int) -> None:
    if engines:
        ray.get(trainer.push.remote(str(folder), engines, version))
    pool.updated(engines, version)


def texts(answers: list[Generation | None]) -> list[tuple[int, ...]]:
    return [ids(generation) for generation in answers if generation is not None]


def rest(pool: EnginePool) -> dict[str, Generation]:
    """Poll until nothing is outstanding."""
    results: list[RequestResult] = []
    while pool.outstanding:
        results += pool.poll(1.0)
    return by_id(results)


def by_id(results: list[RequestResult]) -> dict[str, Generation]:
    assert len({result.request_id for result in results}) == len(results)
    return {result.request_id: result.generation for result in results if result.generation is not None}


def submit_to_both(pool: EnginePool) -> None:
    """Submit all requests, half to each engine; returns while they run."""
    pool.submit(some_requests(), SAMPLING)
    assert pool.poll(0.0) == []
    assert pool._dispatcher.busy == [0, 1]


def wait_for_tokens(engines: dict[int, Any]) -> None:
    while min(ray.get([engine.progress.remote() for engine in engines.values()])) < 3:
        time.sleep(0.05)


def cause(pool: EnginePool, trouble: str, times: int = 1) -> None:
    ray.get([engine.cause.remote(trouble, times) for engine in pool.loaded(wait=False).values()])


def pid(pool: EnginePool, number: int) -> int:
    engine: Any = pool.loaded(wait=False)[number]
    return int(ray.get(engine.pid.remote()))


def test_engines_serve_the_weights_pushed_and_answer_as_one(shared_pool, trainer, folders, answers):
    pool = shared_pool
    pool.submit(some_requests(), SAMPLING)
    assert set(pool.loaded(wait=True)) == set(pool.stale()) == {0, 1}
    assert pool.poll(0.2) == []
    push(pool, trainer, pool.stale(), folders[0], 1)
    assert pool.stale() == {}
    first = rest(pool)
    assert tokens(first) == tokens(answers[0])
    assert {generation.weight_version for generation in first.values()} == {1}
    pool.sleep()
    pool.wake()
    assert set(pool.stale()) == {0, 1}
    push(pool, trainer, pool.loaded(wait=True), folders[1], 2)
    again = pool.generate([some_group(SAMPLING)])
    assert texts(again) == list(tokens(answers[1]).values())
    assert pool.take_counts() == PoolCounts()


def test_a_killed_engine_costs_its_work_and_serves_again_once_it_has_weights(
    pool, trainer, folders, answers, caplog
):
    victim = pid(pool, 0)
    cause(pool, "slow")
    submit_to_both(pool)
    os.kill(victim, signal.SIGKILL)
    assert tokens(rest(pool)) == tokens(answers[1])
    assert pool.take_counts() == PoolCounts(retries=12, restarts=1, deaths=1)
    assert caplog.text.count("rollout engine 0 died") == 1
    assert "is started again" in caplog.text
    assert set(pool.loaded(wait=True)) == {0, 1}
    assert set(pool.stale()) == {0}
    push(pool, trainer, pool.stale(), folders[1], 2)
    submit_to_both(pool)
    assert tokens(rest(pool)) == tokens(answers[1])


def test_a_stopped_engine_is_taken_for_hung_and_a_busy_one_is_not(pool, answers):
    victim = pid(pool, 0)
    cause(pool, "slow")
    submit_to_both(pool)
    os.kill(victim, signal.SIGSTOP)
    assert tokens(rest(pool)) == tokens(answers[1])
    assert pool.take_counts() == PoolCounts(retries=12, restarts=1, hangs=1)


def test_a_call_lasts_as_long_as_its_tokens_come(pool, answers):
    """Longer than every time limit but that for a load."""
    cause(pool, "very slow steps", 10_000)
    submit_to_both(pool)
    start = time.monotonic()
    assert tokens(rest(pool)) == tokens(answers[1])
    assert time.monotonic() - start > STALL_S
    cause(pool, "very slow steps", 0)
    assert pool.take_counts() == PoolCounts()


def test_an_engine_that_answers_probes_and_computes_nothing_is_started_again(pool, answers, caplog):
    ray.get(pool.loaded(wait=False)[0].cause.remote("stuck", 1))
    submit_to_both(pool)
    assert tokens(rest(pool)) == tokens(answers[1])
    assert pool.take_counts() == PoolCounts(retries=12, restarts=1, hangs=1)
    assert (
        "rollout engine 0 computed no token of its 1 calls within rollout.stall_timeout_s = 10 s"
        in caplog.text
    )


def test_abort_returns_unfinished_responses_which_go_on_as_if_nothing_had_been(pool, answers):
    cause(pool, "slow steps", 10_000)
    requests = some_requests()
    submit_to_both(pool)
    pool.submit([replace(requests[0], request_id="late")], SAMPLING)
    wait_for_tokens(pool.loaded(wait=False))
    first = by_id(pool.abort())
    assert pool.outstanding == 0
    assert plain(first.pop("late")) == plain(Generation.not_started(2))
    unfinished = [request for request in requests if first[request.request_id].finish_reason == "abort"]
    assert any(ids(first[request.request_id]) for request in unfinished)
    assert all(
        ids(first[r.request_id]) == ids(answers[1][r.request_id]) for r in requests if r not in unfinished
    )
    cause(pool, "slow steps", 0)
    pool.submit([replace(r, prefix=first[r.request_id].response_ids) for r in unfinished], SAMPLING)
    continued = rest(pool)
    assert {i: ids(first[i]) + ids(g) for i, g in continued.items()} == {
        r.request_id: ids(answers[1][r.request_id]) for r in unfinished
    }
    assert pool.abort() == []
    assert pool.take_counts() == PoolCounts()


def test_an_engine_that_does_not_stop_is_started_again(pool):
    victim = pid(pool, 1)
    cause(pool, "slow steps", 10_000)
    submit_to_both(pool)
    wait_for_tokens(pool.loaded(wait=False))
    os.kill(victim, signal.SIGSTOP)
    back = by_id(pool.abort())
    assert len(back) == 24
    assert sum(plain(generation) == plain(Generation.not_started(2)) for generation in back.values()) >= 12
    assert any(ids(generation) for generation in back.values())
    assert pool.take_counts() == PoolCounts(restarts=1, hangs=1)


def test_an_engine_that_keeps_answering_malformed_is_started_again(pool, answers):
    ray.get(pool.loaded(wait=False)[0].cause.remote("malformed", 3))
    counts: list[PoolCounts] = []
    while not counts or not counts[-1].restarts:
        pool.submit(some_requests(), SAMPLING)
        assert tokens(rest(pool)) == tokens(answers[1])
        counts.append(pool.take_counts())
    assert sum(count.malformed for count in counts) == 3


def test_answers_of_other_weights_are_never_used(pool, answers, caplog):
    ray.get(pool.loaded(wait=False)[1].cause.remote("other weights", 1))
    pool.submit(some_requests(), SAMPLING)
    assert tokens(rest(pool)) == tokens(answers[1])
    assert pool.take_counts() == PoolCounts(retries=12, restarts=1, malformed=1)
    assert "rollout engine 1 answered with weight version 99, not 2" in caplog.text


def test_an_engine_with_a_malformed_status_is_started_again(pool, caplog):
    ray.get(pool.loaded(wait=False)[0].cause.remote("no status", 1))
    assert len(pool.loaded(wait=True)) == 2
    assert pool.take_counts() == PoolCounts(restarts=1, malformed=1)
    assert "rollout engine 0 answered status() with a NoneType, not an EngineStatus" in caplog.text


def test_a_request_that_never_works_is_given_up_alone(pool, answers):
    pool.submit(some_requests(), SAMPLING)
    pool.submit([GenerationRequest("poison", (3, 4), 0)], SAMPLING)
    results = rest(pool)
    assert tokens(results) == tokens(answers[1])


def test_an_engine_that_did_not_take_its_weights_is_started_again(pool):
    pool.failed(1, "did not take the weights")
    assert set(pool.loaded(wait=False)) == {0}
    pool.failed(1, "is reported to have failed twice")
    assert pool.take_counts() == PoolCounts(restarts=1, deaths=1)


class AsyncEngine(LocalEngine):
    """An asyncio actor, like engines around asynchronous libraries."""

    requests_per_call = 3
    calls_at_once = 4

    def pid(self) -> int:
        return os.getpid()

    async def generate(  # type: ignore[override]
        self, requests: list[GenerationRequest], sampling: SamplingParams
    ) -> list[Generation]:
        return await asyncio.to_thread(super().generate, requests, sampling)


def test_an_engine_serves_what_it_loaded_and_without_any_left_the_run_ends_in_a_sentence(
    cluster, folders, answers
):
    rollout = RolloutConfig(num_engines=1, timeout_s=120.0, health_timeout_s=HEALTH_S, max_restarts=0)
    kwargs = {"model_path": str(folders[1]), "dtype": "float32"}
    pool = EnginePool(
        AsyncEngine,
        kwargs,
        rollout,
        vocab_size=1000,
        gpus_per_engine=0,
        keep_batches=False,
        loaded_weights_serve=True,
    )
    try:
        result = pool.generate([some_group(SAMPLING)])
        assert texts(result) == list(tokens(answers[1]).values())
        os.kill(pid(pool, 0), signal.SIGKILL)
        pool.submit(some_requests(), SAMPLING)
        with pytest.raises(UserError, match=r"no rollout engine is left .* engine 0 died: "):
            rest(pool)
        with pytest.raises(UserError, match="no rollout engine is left"):
            pool.loaded(wait=True)
        assert len(by_id(pool.abort())) == 24
        assert pool.outstanding == 0
    finally:
        pool.shutdown()


def test_an_engine_that_cannot_load_says_so_as_itself(cluster, tmp_path):
    kwargs = {"model_path": str(tmp_path), "dtype": "float32"}
    pool = EnginePool(
        LocalEngine,
        kwargs,
        RolloutConfig(num_engines=1),
        vocab_size=1000,
        gpus_per_engine=0,
        keep_batches=False,
    )
    try:
        with pytest.raises(UserError, match=r"has no config\.json"):
            pool.loaded(wait=True)
    finally:
        pool.shutdown()


class DyingEngine(LocalEngine):
    """Dies while it loads, after a message as a library prints it."""

    def __init__(self, *, message: str) -> None:
        self.message = message

    def ready(self) -> None:
        os.write(2, f"loading\n{self.message}\n".encode())
        os._exit(1)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory; see /"),
        (
            "(EngineCore pid=7) ERROR [core.py:1] ValueError: no space for the KV cache",
            "ValueError: no space for the KV cache; see /",
        ),
        (
            "terminate called without an active exception",
            "terminate called without an active exception; see /",
        ),
        ("Fatal Python error: Bus error", "Fatal Python error: Bus error; see /"),
        ("all is well", "unexpectedly before finishing this task; see /"),
    ],
)
def test_an_engine_that_dies_at_its_start_says_why(cluster, message, reason):
    rollout = RolloutConfig(num_engines=1, max_restarts=0)
    pool = EnginePool(
        DyingEngine, {"message": message}, rollout, vocab_size=1000, gpus_per_engine=0, keep_batches=False
    )
    try:
        with pytest.raises(UserError) as ended:
            pool.loaded(wait=True)
    finally:
        pool.shutdown()
    assert str(ended.value).startswith("no rollout engine could start after rollout.max_restarts = 0")
    assert reason in str(ended.value)
    assert "resume" not in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_cluster_without_room_is_said(cluster):
    message = (
        r"50 rollout engines of 1 CPU each \([\d.]+ has \d+ of 6 CPUs free\), within 1 s \(placement_timeout_s\); "
        r"lower rollout\.num_engines or add nodes"
    )
    with pytest.raises(UserError, match=message):
        EnginePool(
            LocalEngine,
            {},
            RolloutConfig(num_engines=50),
            vocab_size=1000,
            gpus_per_engine=0,
            keep_batches=False,
            placement_timeout_s=1.0,
        )


def test_colocated_engines_share_the_gpus_of_the_ranks(cluster):
    class Where:
        """Returns the GPU assigned to it.

        A local class is sent to the actors without importing torch there.
        """

        calls_at_once = 1

        def gpu(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    placement = placement_group([{"CPU": 1, "GPU": 1}] * 2)
    try:
        remote: Any = ray.remote(Where)
        ranks = [
            remote.options(
                num_gpus=1 - COLOCATED_GPU_SHARE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, index),
            ).remote()
            for index in range(2)
        ]
        engines = EngineActors(Where, {}, 2, gpus_per_engine=1, trainer_placement=placement)
        for number in range(2):
            engines.start(number)
        gpus = [ray.get(rank.gpu.remote()) for rank in ranks]
        assert sorted(
            ray.get(engines[number].gpu.remote(), timeout=LONGEST_S) for number in range(2)
        ) == sorted(gpus)
        assert len(set(gpus)) == 2
        engines.shutdown()
        with pytest.raises(UserError, match="3 engines of 1 GPUs do not fit 2 ranks"):
            EngineActors(Where, {}, 3, gpus_per_engine=1, trainer_placement=placement)
    finally:
        remove_placement_group(placement)
