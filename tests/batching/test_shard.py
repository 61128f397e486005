"""All context-parallel ranks' shards together are the complete micro-batch, and valid input of the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.batching.shard import build_shard, zigzag_table
from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from tests.ranks import run_ranks

PAD = 999


def trajectory(prompt, mask, advantage=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return Trajectory(
        group_id="g",
        prompt_ids=rng.integers(0, 99, prompt).tolist(),
        response_ids=rng.integers(0, 99, len(mask)).tolist(),
        response_mask=list(mask),
        rollout_log_probs=rng.normal(size=len(mask)).astype(np.float32).tolist(),
        spans=[VersionSpan(0, 0, len(mask))],
        finish_reason="stop",
        advantage=advantage,
    )


def zigzag_multiple(cp):
    return 2 * cp if cp > 1 else 1


def shards(trajectories, cp, multiple=None, **overrides):
    arguments = {
        "length_multiple": multiple or zigzag_multiple(cp),
        "pad_token_id": PAD,
        "max_position": 4096,
    } | overrides
    return [
        build_shard(trajectories, context_parallel_size=cp, context_parallel_rank=rank, **arguments)
        for rank in range(cp)
    ]


MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=40)
BATCHES = st.lists(st.tuples(st.integers(1, 20), MASKS, st.floats(-3, 3, width=32)), max_size=5).map(
    lambda rows: [trajectory(prompt, mask, advantage, i) for i, (prompt, mask, advantage) in enumerate(rows)]
)


@settings(max_examples=100, deadline=None)
@given(batch=BATCHES, cp=st.sampled_from([1, 2, 4]), factor=st.integers(1, 64))
def test_each_rank_holds_a_multiple_and_no_other_rows(batch, cp, factor):
    """FP8 multiplies complete blocks of tokens: the last sequence's padding fills the last block."""
    multiple = zigzag_multiple(cp)
    for shard, plain in zip(
        shards(batch, cp, pack_multiple=multiple * factor), shards(batch, cp), strict=True
    ):
        assert shard.input_ids.shape[1] * cp % (multiple * factor) == 0
        assert shard.input_ids.shape[1] - plain.input_ids.shape[1] < multiple * factor / cp
        assert torch.equal(shard.cu_seqlens_padded[:-1], plain.cu_seqlens_padded[:-1])
        assert shard.max_seqlen == int(shard.cu_seqlens_padded.diff().max())
    found, expected = (
        sorted(
            row
            for part in parts
            for row in zip(part.row_sequence, part.row_position, part.labels.tolist(), strict=True)
        )
        for parts in (shards(batch, cp, pack_multiple=multiple * factor), shards(batch, cp))
    )
    assert found == expected


def test_a_pack_multiple_that_would_cut_a_sequence_wrongly_is_refused():
    with pytest.raises(ValueError, match="pack_multiple is 6, which is not a multiple of length_multiple 4"):
        shards([trajectory(3, [1, 1])], cp=2, pack_multiple=6)


@settings(max_examples=150, deadline=None)
@given(batch=BATCHES, cp=st.sampled_from([1, 2, 4]), factor=st.integers(1, 3))
def test_the_ranks_together_hold_every_token_and_every_row_once(batch, cp, factor):
    parts = shards(batch, cp, zigzag_multiple(cp) * factor)
    padded = np.diff(parts[0].cu_seqlens_padded.numpy())

    tokens: list[tuple] = []
    rows: list[tuple] = []
    for shard in parts:
        assert torch.equal(shard.cu_seqlens_padded, parts[0].cu_seqlens_padded)
        assert shard.input_ids.shape == shard.position_ids.shape == (1, padded.sum() // cp)
        sequence = np.repeat(np.arange(len(padded)), padded // cp)
        ids, position = shard.input_ids[0].tolist(), shard.position_ids[0].tolist()
        tokens += zip(sequence.tolist(), position, ids, strict=True)
        assert shard.row_index.tolist() == sorted(shard.row_index.tolist())
        for row, token in enumerate(shard.row_index.tolist()):
            assert (sequence[token], position[token]) == (shard.row_sequence[row], shard.row_position[row])
        rows += zip(
            shard.row_sequence.tolist(),
            shard.row_position.tolist(),
            shard.labels.tolist(),
            shard.rows.advantages.tolist(),
            shard.rows.rollout_log_probs.tolist(),
            shard.rows.last_row.tolist(),
            strict=True,
        )

    expected_tokens: list[tuple] = []
    expected_rows: list[tuple] = []
    for s, t in enumerate(batch):
        ids = [*t.prompt_ids.tolist(), *t.response_ids.tolist()]
        expected_tokens += [
            (s, p, token) for p, token in enumerate(ids + [PAD] * (int(padded[s]) - len(ids)))
        ]
        chosen = [k for k, m in enumerate(t.response_mask) if m]
        for k in chosen:
            position = len(t.prompt_ids) + k - 1
            expected_rows.append(
                (
                    s,
                    position,
                    int(t.response_ids[k]),
                    t.advantage,
                    float(t.rollout_log_probs[k]),
                    float(k == chosen[-1]),
                )
            )
    if not batch:
        expected_tokens = [(0, p, PAD) for p in range(int(padded[0]))]
    assert sorted(tokens) == expected_tokens
    assert sorted(rows) == expected_rows
    for shard in parts:
        assert (
            shard.rows.response_length.tolist() == [float(t.response_mask.sum()) for t in batch] or not batch
        )
        assert shard.max_seqlen == padded.max()
    assert all(padded % (zigzag_multiple(cp) * factor) == 0)


def test_the_worked_example_of_the_module_docstring():
    """Exactly the numbers of the example at the top of `batching/shard.py`."""
    a, b = trajectory(2, [1, 1, 1]), trajectory(1, [1, 0, 1])
    a.prompt_ids, a.response_ids = np.int32([10, 11]), np.int32([12, 13, 14])
    b.prompt_ids, b.response_ids = np.int32([20]), np.int32([21, 22, 23])
    first, second = shards([a, b], cp=2, multiple=4)

    assert first.input_ids.tolist() == [[10, 11, PAD, PAD, 20, 23]]
    assert first.position_ids.tolist() == [[0, 1, 6, 7, 0, 3]]
    assert first.row_index.tolist() == [1, 4]
    assert first.labels.tolist() == [12, 21]
    assert first.row_position.tolist() == [1, 0]
    assert first.rows.last_row.tolist() == [0, 0]

    assert second.input_ids.tolist() == [[12, 13, 14, PAD, 21, 22]]
    assert second.position_ids.tolist() == [[2, 3, 4, 5, 1, 2]]
    assert second.row_index.tolist() == [0, 1, 5]
    assert second.labels.tolist() == [13, 14, 23]
    assert second.row_position.tolist() == [2, 3, 2]
    assert second.rows.last_row.tolist() == [0, 1, 1]

    for shard in (first, second):
        assert shard.cu_seqlens_padded.tolist() == [0, 8, 12]
        assert shard.max_seqlen == 8
        assert shard.rows.response_length.tolist() == [3, 2]
    for shard in shards([a, b], cp=2, multiple=4, pack_multiple=8):
        assert shard.cu_seqlens_padded.tolist() == [0, 8, 16]
        assert shard.input_ids.shape == (1, 8)


def test_the_zigzag_against_a_table_by_hand():
    """8 and 16 tokens over two ranks: chunks of 2 and 4. Rank 0 has chunks 0 and 3, rank 1 chunks 1 and 2."""
    first, second = shards([trajectory(3, [1] * 5), trajectory(2, [1] * 14, seed=1)], 2, 8)
    assert first.position_ids[0].tolist() == [0, 1, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15]
    assert second.position_ids[0].tolist() == [2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11]
    assert first.cu_seqlens_padded.tolist() == second.cu_seqlens_padded.tolist() == [0, 8, 24]
    assert first.cu_seqlens_padded.dtype == torch.int32
    assert first.max_seqlen == 16
    # sequence 0: its 5 response tokens (3..7) are predicted at positions 2..6
    assert first.row_position[first.row_sequence == 0].tolist() == [6]
    assert second.row_position[second.row_sequence == 0].tolist() == [2, 3, 4, 5]
    assert first.row_index.tolist()[:1] == [2]


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_the_zigzag_evens_out_causal_attention(cp):
    table = zigzag_table(np.array([16 * cp, 2 * cp]), cp)
    table.validate()
    position_sum = (table.length * (2 * table.first + table.length - 1) / 2).sum(axis=2)  # [cp, S]
    assert (position_sum == position_sum[0]).all()
    assert (table.length.sum(axis=2) == table.length.sum(axis=2)[0]).all()


def loss_of(shard, objective=ObjectiveConfig()):  # noqa: B008
    log_probs = shard.rows.rollout_log_probs.double().requires_grad_()
    rows = replace(shard.rows, old_log_probs=shard.rows.old_log_probs.double())
    result = policy_loss(log_probs, None, rows, objective)
    result.loss_sum.backward()
    return result, log_probs.grad


def test_the_loss_takes_a_shard_and_its_influence_weights_find_their_way_back():
    """Log-ratios are the rollout log-probs: FutureKL is a serial scan over the response, tool tokens 0."""
    batch = [
        trajectory(4, [1, 1, 0, 0, 1, 0], -0.5, 1),
        trajectory(2, [1] * 9, 1.5, 2),
        trajectory(3, [0, 1], 1.0, 3),
    ]
    (shard,) = shards(batch, 1)
    result = loss_of(shard)[0]
    decay = 2 ** (-1 / 32)
    for t, found in zip(batch, shard.scatter_rows(result.future_kl), strict=True):
        future_kl, expected = 0.0, []
        for x, m in reversed(list(zip(t.rollout_log_probs, t.response_mask, strict=True))):
            future_kl = (x if m and x <= np.log(10) else 0.0) + decay * future_kl
            expected.append(future_kl if m else np.nan)
        np.testing.assert_allclose(found, expected[::-1], rtol=1e-6)


def context_parallel_loss(rank, world_size, batch):
    shard = shards(batch, world_size)[rank]
    log_probs = shard.rows.rollout_log_probs.clone().requires_grad_()
    result = policy_loss(log_probs, None, shard.rows, ObjectiveConfig(), torch.distributed.group.WORLD)
    result.loss_sum.backward()
    return result.loss_sum.item(), result.normalizer.item(), shard.scatter_rows(log_probs.grad)


def test_two_context_parallel_ranks_give_the_loss_and_gradient_of_the_unsplit_shard():
    batch = [
        trajectory(4, [1, 1, 0, 0, 1, 0], -0.5, 1),
        trajectory(2, [1] * 9, 1.5, 2),
        trajectory(1, [1] * 30, -1.0, 3),
    ]
    (complete,) = shards(batch, 1)
    result, gradient = loss_of(complete)
    first, second = run_ranks(2, context_parallel_loss, batch)
    assert first[0] + second[0] == pytest.approx(result.loss_sum.item(), rel=1e-5)
    assert first[1] + second[1] == result.normalizer.item() == complete.num_rows
    for expected, a, b in zip(complete.scatter_rows(gradient), first[2], second[2], strict=True):
        np.testing.assert_allclose(np.where(np.isnan(a), b, a), expected, rtol=1e-5)


def test_scattered_rows_of_all_ranks_fill_exactly_the_chosen_tokens():
    batch = [
        trajectory(4, [1, 1, 0, 0, 1, 0], seed=1),
        trajectory(2, [1] * 9, seed=2),
        trajectory(3, [0, 0], seed=3),
    ]
    found = [
        np.stack(values)
        for values in zip(*(s.scatter_rows(s.labels.float()) for s in shards(batch, 4)), strict=True)
    ]
    for t, values in zip(batch, found, strict=True):
        np.testing.assert_array_equal((~np.isnan(values)).sum(axis=0), t.response_mask)
        np.testing.assert_array_equal(np.nansum(values, axis=0), np.array(t.response_ids) * t.response_mask)
    with pytest.raises(ValueError, match="shape"):
        shards(batch, 1)[0].scatter_rows(np.zeros(3))


@pytest.mark.parametrize("cp", [1, 2])
def test_an_empty_micro_batch_is_padding_without_rows_and_gives_no_loss(cp):
    for shard in shards([], cp, 8):
        assert shard.input_ids.tolist() == [[PAD] * (8 // cp)]
        assert shard.cu_seqlens_padded.tolist() == [0, 8]
        assert shard.num_rows == 0
        assert shard.scatter_rows(torch.zeros(0)) == []
        assert shard.rows.response_length.tolist() == [0.0]
    result, _ = loss_of(shards([], 1, 8)[0])
    assert result.loss_sum.item() == 0
    assert result.normalizer.item() == 0


def test_old_log_probs_and_device_moves_change_nothing_else():
    (shard,) = shards([trajectory(4, [1, 0, 1])], 1)
    assert shard.rows.old_log_probs.tolist() == [0.0, 0.0]
    scored = shard.with_old_log_probs(torch.tensor([-1.0, -2.0])).to("cpu")
    assert scored.rows.old_log_probs.tolist() == [-1.0, -2.0]
    assert torch.equal(scored.rows.advantages, shard.rows.advantages)
    with pytest.raises(ValueError, match="2 rows"):
        shard.with_old_log_probs(torch.zeros(3))
    moved = shard.to("meta")
    assert {
        moved.input_ids.device.type,
        moved.rows.advantages.device.type,
        moved.rows.plan.first_row_offset.device.type,
    } == {"meta"}


def test_trajectories_that_cannot_be_packed_are_named():
    good = trajectory(2, [1, 1])
    for field, value, message in [
        ("prompt_ids", [], "empty prompt"),
        ("response_mask", [1], "2 response tokens but 1 values in response_mask"),
        ("rollout_log_probs", [0.0] * 3, "3 values in rollout_log_probs"),
        ("advantage", float("nan"), "advantage nan"),
        ("advantage", float("inf"), "advantage inf"),
    ]:
        with pytest.raises(ValueError, match=f"trajectory 1 of group other .*{message}"):
            shards([good, replace(good, group_id="other", **{field: value})], 1)
    with pytest.raises(
        ValueError, match="trajectory 0 of group g has 4 tokens, but the model has 3 positions"
    ):
        shards([good], 1, max_position=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        shards([good], 2, 2)


def test_routes_of_two_models_are_not_mixed():
    one, other = trajectory(2, [1, 1, 1]), trajectory(1, [1, 1])
    one.routes, other.routes = np.zeros((4, 3, 2), np.uint8), np.zeros((2, 1, 2), np.uint8)
    with pytest.raises(ValueError, match=r"have \[1, 2\] layers and experts per token, others \[3, 2\]"):
        shards([one, other], 1)
