"""The shares of the data-parallel ranks are the iteration, and hold nothing else."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.iteration_batch import plan_iteration
from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import Config
from megatron_fipo.config.schema import BatchConfig, ParallelConfig


def group(name: str, lengths: list[int]) -> list[Trajectory]:
    return [
        Trajectory(
            name,
            np.arange(3, dtype=np.int32),
            np.arange(length, dtype=np.int32),
            np.ones(length, dtype=np.int8),
            np.zeros(length, dtype=np.float32),
            [VersionSpan(0, 0, length)],
            "stop",
        )
        for length in lengths
    ]


def config(data_parallel_size: int, mini_batch_prompts: int) -> Config:
    batch = BatchConfig(mini_batch_prompts=mini_batch_prompts, max_tokens_per_micro_batch=64)
    return replace(Config(), batch=batch, parallel=ParallelConfig(data_parallel_size=data_parallel_size))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=8), st.data())
def test_the_shares_are_the_iteration(lengths, data):
    ranks, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    groups = [group(f"{index}", members) for index, members in enumerate(lengths)]
    batch = plan_iteration(groups, config(ranks, size), pad_token_id=0)
    assert batch.data_parallel_size == ranks
    shares = [batch.share(rank) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share.trajectories) == list(
        range(len(batch.trajectories))
    )
    for step in range(len(batch.mini_batches)):
        trained = [
            trajectory for share in shares for micro in share.micro_batches(step) for trajectory in micro
        ]
        expected = [t for members in groups[step * size : (step + 1) * size] for t in members]
        assert {id(t) for t in trained} == {id(t) for t in expected}
        assert len(trained) == len(expected)
        assert len({len(share.micro_batches(step)) for share in shares}) == 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_receives_its_share_only(ranks):
    """At 9 bytes per response token, and without Python objects per token."""
    groups = [group(f"{index}", [5000] * 4) for index in range(8)]
    settings_ = replace(
        config(ranks, 4), batch=BatchConfig(mini_batch_prompts=4, max_tokens_per_micro_batch=8000)
    )
    batch = plan_iteration(groups, settings_, pad_token_id=0)
    tokens = 8 * 4 * 5000
    for rank in range(ranks):
        buffers: list[pickle.PickleBuffer] = []
        in_band = pickle.dumps(batch.share(rank), protocol=5, buffer_callback=buffers.append)
        assert sum(buffer.raw().nbytes for buffer in buffers) == pytest.approx(9 * tokens / ranks, rel=0.01)
        assert len(in_band) < 0.1 * tokens / ranks
