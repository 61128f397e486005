"""Engine pool and weight push with real actors: faults cost work, never correctness."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from megatron_fipo.config import RolloutConfig
from megatron_fipo.data.dataset import Dataset
from megatron_fipo.data.problem import Problem
from megatron_fipo.errors import UserError
from megatron_fipo.reward.score import Score
from megatron_fipo.rollout.collector import Collected, Group, GroupScorer, collect_iteration
from megatron_fipo.rollout.local import LocalEngine
from megatron_fipo.rollout.pool import EnginePool, StaleWeightsError
from megatron_fipo.rollout.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.rollout.weight_sync import WeightSyncError, push_weights
from tests.rollout.tiny import save_model, some_requests

SAMPLING = SamplingParams(1.0, 1.0, 24)


class TroubledEngine(LocalEngine):
    """A local engine that has the troubles which files in the folder `troubles` name.

    `slow` and `poison` last while their file is there; the others take it away, so they strike one call of one engine.
    """

    def __init__(self, model_path: str, troubles: str) -> None:
        super().__init__(model_path, "float32")
        self.troubles = Path(troubles)

    def pid(self) -> int:
        return os.getpid()

    def _strikes(self, trouble: str) -> bool:
        try:
            (self.troubles / trouble).unlink()
        except FileNotFoundError:
            return False
        return True

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[list[Generation]]:
        if (self.troubles / "slow").exists():
            time.sleep(1.5)
        if self._strikes("raise"):
            raise ArithmeticError("an unlucky call")
        if self._strikes("garbage"):
            return [[] for _ in requests]
        if (self.troubles / "poison").exists() and any(request.request_id == "request-2" for request in requests):
            raise ArithmeticError("never works")
        return super().generate(requests, sampling)

    def load_weights(self, bucket: dict[str, torch.Tensor]) -> None:
        if self._strikes("slow_load"):
            time.sleep(600)
        super().load_weights(bucket)
        if self._strikes("corrupt"):
            next(iter(self._held().values())).view(-1)[0] += 1


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("troubles")


@pytest.fixture(scope="module")
def pool(cluster: None, model_folder: Path, troubles: Path) -> Iterator[EnginePool]:
    """Three engines for all tests, since each takes seconds to start. The tests run in order: engine 2 dies in the first of them,
    then weight versions only move on, and the last two tests lose the other engines."""
    kwargs = {"model_path": str(model_folder), "troubles": str(troubles)}
    pool = EnginePool(TroubledEngine, kwargs, 3, max_retries=2, timeout_s=240.0)
    yield pool
    pool.shutdown()


@pytest.fixture(autouse=True)
def no_trouble_is_left_over(troubles: Path) -> Iterator[None]:
    yield
    for trouble in troubles.iterdir():
        trouble.unlink()


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[list[tuple[int, ...]]]:
    """What one engine in this process answers."""
    engine = LocalEngine(str(model_folder), "float32")
    engine.ready()
    return tokens(engine.generate(some_requests(), SAMPLING))


def tokens(results: Sequence[list[Generation] | None]) -> list[list[tuple[int, ...]]]:
    return [[generation.response_ids for generation in answer] for answer in results if answer is not None]


def test_a_round_of_dynamic_sampling_survives_a_killed_engine(pool, troubles):
    (troubles / "slow").touch()
    problems = [Problem(f"p{index}", request.prompt_ids, "", "", "test") for index, request in enumerate(some_requests(12))]
    score_group = GroupScorer(
        lambda text, problem, reason: Score(float(len(text) % 2), float(len(text) % 2), text),
        lambda ids: "x" * len(ids),
        SAMPLING.max_new_tokens,
        overlong_buffer=0,
        overlong_factor=1.0,
    )
    config = RolloutConfig(prompts_per_round=8, max_generation_rounds=3, max_response_length=SAMPLING.max_new_tokens)

    def collect() -> Collected:
        return collect_iteration(
            Dataset(problems, seed=1),
            pool,
            score_group,
            config,
            target_groups=10,
            responses_per_prompt=4,
            surplus=[],
            version=0,
            seed=1,
        )

    killer = threading.Timer(0.5, ray.kill, (pool.engines[2],))
    killer.start()
    struck = collect()
    assert list(pool.engines) == [0, 1]
    counts = struck.counts
    assert counts.prompts == counts.informative + counts.all_right + counts.all_wrong + counts.failed
    assert counts.informative == len(struck.groups) + len(struck.surplus)
    assert (counts.failed, counts.retries) == (0, 3)

    calm = collect()
    assert calm.counts.retries == 0
    assert responses(struck.groups) == responses(calm.groups)
    assert responses(struck.surplus) == responses(calm.surplus)


def responses(groups: list[Group]) -> list[list[list[int]]]:
    return [[trajectory.response_ids for trajectory in group] for group in groups]


def test_two_engines_answer_as_one(pool, expected):
    heard: list[int] = []
    result = pool.generate(some_requests(), SAMPLING, version=0, on_finished=heard.append)
    assert tokens(result.generations) == expected
    assert result.retries == 0
    assert heard[-1] == 6


@pytest.mark.parametrize("trouble", ["raise", "garbage"])
def test_a_failed_call_is_made_again(pool, troubles, expected, trouble):
    (troubles / trouble).touch()
    result = pool.generate(some_requests(), SAMPLING, version=0)
    assert tokens(result.generations) == expected
    assert result.retries == 3
    assert len(pool.engines) == 2


def test_a_request_that_never_works_is_given_up_alone(pool, troubles, expected):
    (troubles / "poison").touch()
    result = pool.generate(some_requests(), SAMPLING, version=0)
    assert [index for index, answer in enumerate(result.generations) if answer is None] == [2]
    assert tokens(result.generations) == expected[:2] + expected[3:]


def test_answers_of_other_weights_are_refused(pool):
    with pytest.raises(StaleWeightsError, match=r"engine \d answered with weight version 0, not 99"):
        pool.generate(some_requests(), SAMPLING, version=99)


def test_an_engine_that_cannot_load_says_so_as_itself(cluster, tmp_path):
    with pytest.raises(UserError, match=r"no folder with a config\.json"):
        EnginePool(LocalEngine, {"model_path": str(tmp_path), "dtype": "float32"}, 1, max_retries=0, timeout_s=60.0)


class TrainerRank:
    """Stands where the trainer's rank 0 stands: an actor that holds new weights and pushes them."""

    def __init__(self, folder: str) -> None:
        self.weights = load_file(Path(folder, "model.safetensors"))
        self.exported = 0

    def push(self, engines: dict, version: int, timeout_s: float, drop: str | None = None) -> None:
        push_weights(self._export(drop), engines, version, bucket_bytes=10_000, timeout_s=timeout_s)

    def _export(self, drop: str | None) -> Iterator[tuple[str, torch.Tensor | None]]:
        self.exported = 0
        for name, tensor in self.weights.items():
            self.exported += 1
            if name != drop:
                yield name, tensor

    def exported_all(self) -> bool:
        return self.exported == len(self.weights)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=9)


@pytest.fixture(scope="module")
def trainer(cluster: None, new_folder: Path) -> Iterator:
    actor: Any = ray.remote(TrainerRank).options(num_cpus=1).remote(str(new_folder))
    yield actor
    ray.kill(actor)


def push(trainer, *args) -> None:
    try:
        ray.get(trainer.push.remote(*args))
    except ray.exceptions.RayTaskError as error:
        assert ray.get(trainer.exported_all.remote()), "the collective export was left halfway"
        raise error.cause from None


def test_pushed_weights_serve_as_a_fresh_engine_does(pool, trainer, new_folder):
    push(trainer, pool.engines, 3, 60.0)
    fresh = LocalEngine(str(new_folder), "float32")
    fresh.ready()
    for sampling in (SAMPLING, SamplingParams(0.0, 1.0, 24)):
        result = pool.generate(some_requests(), sampling, version=3)
        assert tokens(result.generations) == tokens(fresh.generate(some_requests(), sampling))


def test_a_push_that_ends_in_other_weights_is_said(pool, troubles, trainer):
    (troubles / "corrupt").touch()
    with pytest.raises(WeightSyncError, match=r"rollout engine \d holds other weights than were sent for version 4"):
        push(trainer, pool.engines, 4, 60.0)


def test_an_incomplete_push_is_refused(pool, trainer):
    with pytest.raises(UserError, match=r"lacks 1 of the engine's tensors, the first is model\.norm\.weight"):
        push(trainer, pool.engines, 5, 60.0, "model.norm.weight")


def test_a_push_to_a_dead_engine_names_it(pool, trainer):
    os.kill(ray.get(pool.engines[0].pid.remote()), signal.SIGKILL)
    with pytest.raises(WeightSyncError, match="rollout engine 0 died while taking the weights") as caught:
        push(trainer, pool.engines, 6, 60.0)
    assert caught.value.engine == 0
    assert list(pool.check()) == [1]


def test_a_hanging_engine_misses_its_deadlines(pool, troubles, trainer, caplog):
    """First in a push; then, as it hangs on, in a round, and as it is the last one the run stops with a sentence."""
    (troubles / "slow_load").touch()
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"engine 1 did not take the weights within rollout\.timeout_s = 2 s"):
        push(trainer, pool.engines, 7, 2.0)
    pool._timeout_s = 2.0
    with pytest.raises(UserError, match="no rollout engine is left"):
        pool.generate(some_requests(), SAMPLING, version=3)
    assert caplog.text.count("rollout engine 1 gave no answer within 2 s and is killed; 0 left") == 1
    assert time.monotonic() - started < 60
