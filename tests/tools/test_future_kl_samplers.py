"""Log-probs of a trainer's rank, of its model in bfloat16 and of transformers, on the bundled base model."""

import os

import numpy as np
import pytest
import torch

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import load_config
from megatron_fipo.trainer.rl_worker import RLWorker
from tests.ranks import run_ranks
from tools.future_kl.replay import grid, padded, scores
from tools.future_kl.run import for_one_rank
from tools.future_kl.samplers import BFloat16Trainer, transformers_log_probs

PROMPT = [6, 19, 10, 19, 8, 17, 5, 9, 20]


def responses() -> list[Trajectory]:
    """Random tokens, with a gap of tool output in the first."""
    rng = np.random.default_rng(0)
    found = []
    for length in (30, 12, 21):
        mask, ids = np.ones(length, dtype=np.int8), rng.integers(3, 32, size=length)
        spans = [VersionSpan(0, 0, length)]
        found.append(Trajectory("g", PROMPT[len(found) :], ids, mask, np.zeros(length), spans, "stop"))
    found[0].response_mask[5:9] = 0
    return found


def measured(rank: int, world_size: int) -> dict[str, np.ndarray]:
    """By method: log-probs [3, 30] of the responses in two micro-batches; `entropy` too."""
    torch.set_num_threads(1)
    # A forked process cannot use the parent's pool of threads, which transformers' loading threads would ask for.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    worker = RLWorker(rank, world_size, for_one_rank(load_config("examples/countdown/fipo.yaml", [])))
    worker.build()
    first, second, third = responses()
    shards = worker.shards([[first], [second, third]], pad_token_id=0)
    policy = worker.policy
    now = scores(policy, shards)
    bfloat16 = BFloat16Trainer(worker.config, worker.device)
    bfloat16.take(policy)
    (float32,) = transformers_log_probs(worker, [[first, second, third]], "float32")
    (rounded,) = transformers_log_probs(worker, [[first, second, third]], "bfloat16")
    with torch.no_grad():
        return {
            "trainer": grid(shards, policy.log_probs(shards)),
            "scores": grid(shards, [values[0] for values in now]),
            "entropy": grid(shards, [values[1] for values in now]),
            "bfloat16": grid(shards, bfloat16.log_probs(shards)),
            "transformers": padded(float32),
            "transformers bfloat16": padded(rounded),
        }


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    return run_ranks(1, measured)[0]


def test_the_pass_with_entropies_gives_the_trainers_log_probs_bit_for_bit(found):
    assert np.array_equal(found["scores"], found["trainer"], equal_nan=True)
    assert found["entropy"].shape == (3, 30)
    sampled = ~np.isnan(found["trainer"])
    assert sampled.sum() == 30 - 4 + 12 + 21
    assert (found["entropy"][sampled] > 0).all()
    assert (found["entropy"][sampled] <= np.log(32)).all()


def test_transformers_scores_the_same_tokens(found):
    sampled = ~np.isnan(found["trainer"])
    assert found["transformers"][sampled] == pytest.approx(found["trainer"][sampled], abs=2e-5)


@pytest.mark.parametrize("name", ["bfloat16", "transformers bfloat16"])
def test_bfloat16_differs_by_its_rounding(found, name):
    sampled = ~np.isnan(found["trainer"])
    error = (found[name] - found["trainer"])[sampled]
    assert 1e-4 < error.std() < 0.2
    assert abs(error.mean()) < error.std()
