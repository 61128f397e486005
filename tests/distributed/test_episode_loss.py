"""From an episode to the loss: observations have no row, and the gradients of all other tokens are the oracle's, also on two ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.batching.shard import build_shard
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.driver.rollout.prompt_group import EpisodeGeneration, PromptGroup, Response
from megatron_fipo.driver.rollout.trajectories import Overlong, trajectories
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.tasks.task import Problem, Score, TaskSettings
from tests.objective import oracle
from tests.ranks import run_ranks

FIPO = ObjectiveConfig(half_life=6.0, influence_clip=(0.5, 1.5), safety_threshold=3.0)
OBSERVATIONS = [((1, 4), (9, 20)), (), ((30, 31), (32, 47)), ((5, 6),)]
"""Of each response: also over chunks of the context-parallel cut, and with one sampled token in between."""
LENGTHS = [25, 13, 60, 7]


def episodes() -> list[Trajectory]:
    """As the driver makes them of a scored group."""
    problem = Problem("p", (7, 8, 9), "prompt", "x", "test", task=TaskSettings(environment="m:step"))
    responses = []
    for length, ranges in zip(LENGTHS, OBSERVATIONS, strict=True):
        ids, log_probs = np.arange(length, dtype=np.int32), np.full(length, -1, np.float32)
        responses.append(
            Response.of(EpisodeGeneration(ids, log_probs, "stop", 0, observations=ranges, score=None))
        )
    scores = [Score(float(index), float(index % 2)) for index in range(len(responses))]
    made = trajectories(PromptGroup(0, problem, responses), scores, Overlong(99, 0, 0.0))
    for trajectory, advantage in zip(made, [1.0, -1.0, 0.5, -0.25], strict=True):
        trajectory.advantage = advantage
    return made


def values(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New and old log-probs of all tokens of a response, those of observations far apart."""
    random = np.random.default_rng(index)
    old = -random.random(LENGTHS[index]) * 3 - 0.1
    new = old + random.normal(scale=0.3, size=len(old))
    for start, end in OBSERVATIONS[index]:
        new[start:end] += 5.0
    return torch.from_numpy(new), torch.from_numpy(old)


def step_on_rank(rank: int, world_size: int) -> tuple[dict, dict]:
    """Gradient and FutureKL of this rank's rows, by (response, token)."""
    shard = build_shard(
        episodes(),
        context_parallel_size=world_size,
        context_parallel_rank=rank,
        length_multiple=2 * world_size if world_size > 1 else 1,
        pad_token_id=0,
        max_position=100,
    )
    place = shard.row_position + 1 - shard.prompt_lengths[shard.row_sequence]
    origin = list(zip(shard.row_sequence.tolist(), place.tolist(), strict=True))
    assert shard.labels.tolist() == [token for _, token in origin]
    new, old = (torch.stack([values(s)[which][t] for s, t in origin]) for which in (0, 1))
    new.requires_grad_()
    rows = replace(
        shard.rows,
        old_log_probs=old,
        **{
            name: getattr(shard.rows, name).double()
            for name in ("advantages", "last_row", "response_length", "rollout_log_probs")
        },
    )
    group = dist.group.WORLD if world_size > 1 else None
    loss = policy_loss(new, torch.zeros_like(new), rows, FIPO, group, "torch")
    normalizer = loss.normalizer.detach().clone()
    if group is not None:
        dist.all_reduce(normalizer)
    (loss.loss_sum / normalizer).backward()
    assert new.grad is not None
    return dict(zip(origin, new.grad.tolist(), strict=True)), dict(
        zip(origin, loss.future_kl.tolist(), strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_episodes_equal_the_oracle(world_size):
    members = []
    for index, trajectory in enumerate(episodes()):
        new, old = values(index)
        mask = torch.from_numpy(trajectory.response_mask).double()
        advantages = torch.full_like(mask, trajectory.advantage)
        members.append(oracle.Response(new.requires_grad_(), old, advantages, mask))
    expected = oracle.oracle_loss(members, FIPO)
    expected.loss.backward()
    results = run_ranks(world_size, step_on_rank)
    gradients = {key: value for result in results for key, value in result[0].items()}
    future_kl = {key: value for result in results for key, value in result[1].items()}
    sampled = {(index, token) for index, member in enumerate(members) for token in member.tokens}
    assert set(gradients) == sampled, "an observation has no row, so no loss and no gradient"
    assert len(sampled) == sum(trajectory.sampled_tokens for trajectory in episodes())
    for index, member in enumerate(members):
        assert member.log_probs.grad is not None
        for token in range(LENGTHS[index]):
            found = gradients.get((index, token), 0.0)
            assert found == pytest.approx(float(member.log_probs.grad[token]), rel=1e-9, abs=1e-12)
        for token in member.tokens:
            assert future_kl[index, token] == pytest.approx(float(expected.future_kl[index][token]), rel=1e-9)


def test_influence_decays_over_an_observation():
    """The token before an observation of 3 is as far from the token after it as if these had been sampled."""
    found = step_on_rank(0, 1)[1]
    new, old = values(0)
    gamma = 2.0 ** (-1.0 / FIPO.half_life)
    assert found[0, 0] == pytest.approx(float(new[0] - old[0]) + gamma**4 * found[0, 4], rel=1e-9)
