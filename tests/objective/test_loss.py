"""Loss and gradient of packed, context-parallel micro-batches against the oracle, on real ranks."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss
from megatron_fipo.objective.scan_layout import ALL_GATHER
from megatron_fipo.objective.statistics import Statistics
from tests.objective.oracle import OracleResult, Response, oracle_loss
from tests.objective.packed import contiguous, packed_rows, random_responses, zigzag
from tests.ranks import run_ranks

SAFE_7B = ObjectiveConfig(influence_clip=(0.8, 1.2), safety_threshold=3.0)
OBJECTIVES = {
    "fipo": replace(SAFE_7B, name="fipo"),
    "fipo_entropy_bonus": ObjectiveConfig(half_life=math.inf, entropy_coefficient=0.01),
    "fipo_no_clip_keeps_all": ObjectiveConfig(influence_clip=None, drop_dual_clipped=False, half_life=4.0),
    "fipo_no_filter": ObjectiveConfig(
        influence_clip=None, drop_dual_clipped=False, half_life=4.0, filter_future_kl=False
    ),
    "fipo_reference": replace(SAFE_7B, name="fipo", normalization="reference_micro_batch"),
    "fipo_responses": replace(SAFE_7B, name="fipo", normalization="response_mean"),
    "dapo": ObjectiveConfig(name="dapo"),
    "dapo_reference": ObjectiveConfig(name="dapo", normalization="reference_micro_batch"),
    "grpo_kl": ObjectiveConfig(name="grpo", kl_coefficient=0.05, entropy_coefficient=0.01),
    "fipo_tis": replace(SAFE_7B, name="fipo", correction="tis", correction_cap=1.5, entropy_coefficient=0.01),
    "fipo_reference_mis": replace(
        SAFE_7B, name="fipo", normalization="reference_micro_batch", correction="mis", correction_cap=1.5
    ),
    "grpo_kl_tis": ObjectiveConfig(name="grpo", kl_coefficient=0.05, correction="tis"),
}
LENGTHS = [1, 5, 37, 64, 3, 130, 90, 2]
"""One token; fewer tokens than chunks; not multiples of 2·cp; more than one block."""
PROMPTS = [2, 0, 40, 7, 1, 3, 200, 9]
"""After the long prompt a response is inside one chunk, and some ranks hold no row of it."""
MICRO_BATCHES = ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0], [1, 2], [3, 4, 5, 6], [7]], [[7, 3, 5], [6, 0, 2, 4, 1]])


def responses() -> list[Response]:
    made = random_responses(11, LENGTHS, outliers=0.015)
    made[3].mask[:] = 0
    made[3].mask[10] = 1  # all but one token masked
    for response in (made[0], made[7]):
        response.mask[-1] = 1
    plant_dual_clipped(
        made[5], -1.0, [3, 120]
    )  # on different ranks: only their sum shows that the response is dropped
    plant_dual_clipped(made[4], -1.0, [1])
    plant_dual_clipped(made[6], 1.0, [5, 50])
    return made


def plant_dual_clipped(response: Response, advantage: float, tokens: list[int]) -> None:
    """Ratios of 20 at `tokens`, nowhere else above the dual clip."""
    response.advantages = torch.full_like(response.advantages, advantage)
    response.mask[tokens] = 1
    with torch.no_grad():
        delta = (response.log_probs - response.old_log_probs).clamp(max=1.0)
        delta[tokens] = math.log(20.0)
        response.log_probs.copy_(response.old_log_probs + delta)


def mini_batch(
    rank: int,
    world_size: int,
    members: list[Response],
    objective,
    micro_batches,
    layout=zigzag,
    kernels="torch",
):
    """What one rank does in a mini-step: loss sums and normalizers over micro-batches, one division, one backward."""
    group = dist.group.WORLD if world_size > 1 else None
    losses: list[PolicyLoss] = []
    gradients: dict[tuple[int, int], float] = {}
    inputs = []
    for members_of_batch in micro_batches:
        batch = [members[i] for i in members_of_batch]
        prompts = [PROMPTS[i] for i in members_of_batch]
        table = layout([p + len(r.mask) for p, r in zip(prompts, batch, strict=True)], world_size)
        rows, origin = packed_rows(batch, prompts, table, rank)
        log_probs, entropy = (
            torch.tensor(
                [getattr(batch[s], name)[t].item() for s, t in origin], dtype=torch.float64
            ).requires_grad_()
            for name in ("log_probs", "entropy")
        )
        if not objective.kl_coefficient:
            rows = replace(rows, reference_log_probs=None)
        losses.append(policy_loss(log_probs, entropy, rows, objective, group, kernels))
        inputs.append((log_probs, [(members_of_batch[s], t) for s, t in origin]))
    totals = torch.stack([torch.stack([loss.loss_sum.detach(), loss.normalizer]) for loss in losses]).sum(0)
    if group is not None:
        dist.all_reduce(totals)
    (sum(loss.loss_sum for loss in losses) / totals[1].clamp(min=1)).backward()
    for log_probs, origin in inputs:
        assert log_probs.grad is not None
        gradients |= dict(zip(origin, log_probs.grad.tolist(), strict=True))
    statistics = Statistics.empty()
    for loss in losses:
        statistics = statistics.merge(loss.statistics)
    per_row = {
        name: {
            key: value
            for loss, (_, origin) in zip(losses, inputs, strict=True)
            for key, value in zip(origin, getattr(loss, name).tolist(), strict=True)
        }
        for name in ("future_kl", "influence_weights", "kept")
    }
    return (
        (totals[0] / totals[1].clamp(min=1)).item(),
        gradients,
        per_row,
        statistics.reduce(group).finalize(),
    )


def gather(results) -> tuple[float, dict, dict, dict]:
    """One answer from all ranks: loss and statistics must agree, rows must be disjoint."""
    loss, _, _, statistics = results[0]
    assert all(result[0] == loss and result[3] == statistics for result in results)
    gradients = {key: value for result in results for key, value in result[1].items()}
    assert len(gradients) == sum(len(result[1]) for result in results)
    per_row = {
        name: {k: v for result in results for k, v in result[2][name].items()} for name in results[0][2]
    }
    return loss, gradients, per_row, statistics


@dataclass
class Expected:
    """Results of the oracle: loss, and per (response, token) the gradient and the rest."""

    loss: float
    gradients: dict[tuple[int, int], float]
    result: OracleResult

    @classmethod
    def of(cls, members: list[Response], objective: ObjectiveConfig, micro_batches) -> "Expected":
        result = oracle_loss(members, objective, micro_batches)
        gradients = torch.autograd.grad(
            result.loss, [r.log_probs for r in members], allow_unused=True, materialize_grads=True
        )
        by_token = {(i, t): gradients[i][t].item() for i, r in enumerate(members) for t in r.tokens}
        return cls(result.loss.item(), by_token, result)


def assert_same(found, expected: Expected) -> None:
    loss, gradients, per_row, _ = gather(found)
    oracle = expected.result
    assert loss == pytest.approx(expected.loss, rel=1e-10, abs=1e-12)
    assert gradients == pytest.approx(expected.gradients, rel=1e-10, abs=1e-14)
    for i, t in expected.gradients:
        assert per_row["kept"][i, t] == oracle.kept[i]
        if oracle.kept[i]:
            assert per_row["future_kl"][i, t] == pytest.approx(
                oracle.future_kl[i][t].item(), rel=1e-10, abs=1e-12
            )
            assert per_row["influence_weights"][i, t] == pytest.approx(
                oracle.influence_weights[i][t].item(), rel=1e-10
            )


CASES = [(name, micro_batches) for name in OBJECTIVES for micro_batches in MICRO_BATCHES]


def _grid(rank: int, world_size: int, layout) -> list:
    members = responses()
    return [
        mini_batch(rank, world_size, members, OBJECTIVES[name], batches, layout) for name, batches in CASES
    ]


@pytest.fixture(scope="module")
def expected() -> list[Expected]:
    members = responses()
    return [Expected.of(members, OBJECTIVES[name], batches) for name, batches in CASES]


@pytest.mark.parametrize(("cp", "layout"), [(1, zigzag), (2, zigzag), (3, contiguous), (4, zigzag)])
def test_no_split_changes_loss_or_gradient(cp, layout, expected) -> None:
    """Every objective, three packings, 1 to 4 context-parallel ranks: the oracle's loss and its gradient of every token."""
    results = run_ranks(cp, _grid, layout)
    for case, oracle in enumerate(expected):
        assert_same([result[case] for result in results], oracle)


def test_the_grid_exercises_the_rules(expected) -> None:
    """Responses are dropped under fipo and only there, the reference's normalization really differs by packing, and the
    filter of FutureKL changes F and the loss."""
    kept = {name: oracle.result.kept for (name, _), oracle in zip(CASES, expected, strict=True)}
    assert kept["fipo"] == [i != 5 for i in range(8)]
    assert all(kept["dapo"])
    assert all(kept["grpo_kl"])
    assert all(kept["fipo_no_clip_keeps_all"])
    losses = [
        oracle.loss for (name, _), oracle in zip(CASES, expected, strict=True) if name == "fipo_reference"
    ]
    assert np.ptp(losses) > 1e-3
    filtered, unfiltered = (
        next(oracle for (case, _), oracle in zip(CASES, expected, strict=True) if case == name)
        for name in ("fipo_no_clip_keeps_all", "fipo_no_filter")
    )
    added = unfiltered.result.future_kl[5] - filtered.result.future_kl[5]
    assert added[[3, 120]].tolist() == pytest.approx([math.log(20.0)] * 2, abs=0.1)  # its outliers
    assert added.min() >= 0
    assert abs(unfiltered.loss - filtered.loss) > 1e-3


def count_collectives(
    rank: int, world_size: int, length: int, correction: str, kernels: str = "torch"
) -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []

    def counted(name, function):
        def wrapper(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            calls.append((name, min(t.nbytes for t in tensors) if tensors else 0))
            return function(*args, **kwargs)

        return wrapper

    names = [
        n
        for n in dir(dist)
        if n.startswith(("all_", "reduce", "broadcast", "send", "recv", "isend", "irecv", "gather"))
    ]
    names += ["scatter", "barrier", "batch_isend_irecv"]
    members = random_responses(0, [length, length // 2, 7])
    rows, _origin = packed_rows(
        members, [3, 4, 5], zigzag([length + 3, length // 2 + 4, 12], world_size), rank
    )
    log_probs = rows.old_log_probs.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if callable(getattr(dist, name)):
                patch.setattr(dist, name, counted(name, getattr(dist, name)))
        policy_loss(
            log_probs, None, rows, ObjectiveConfig(correction=correction), dist.group.WORLD, kernels
        ).loss_sum.backward()
    return calls


@pytest.mark.parametrize(("cp", "correction"), [(2, "none"), (4, "none"), (4, "tis")])
def test_one_all_gather_of_constant_size(cp, correction) -> None:
    """Forward and backward of a micro-batch of three sequences: one all-gather of 32 bytes per sequence, at any length."""
    for length in (16, 1600):
        for calls in run_ranks(cp, count_collectives, length, correction):
            assert calls == [(ALL_GATHER, 3 * 32)]


def _poison(rank: int, world_size: int) -> list:
    found = []
    for value in (math.nan, math.inf, -math.inf):
        for field in ("log_probs", "old_log_probs", "entropy", "rollout_log_probs"):
            members = responses()
            with torch.no_grad():
                getattr(members[6], field)[33] = value
                members[6].mask[33] = 1
            name = "fipo_tis" if field == "rollout_log_probs" else "fipo_entropy_bonus"
            found.append((name, mini_batch(rank, world_size, members, OBJECTIVES[name], MICRO_BATCHES[0])))
    return found


@pytest.mark.parametrize("cp", [1, 4])
def test_a_non_finite_number_stays_in_its_response(cp) -> None:
    """It takes its own response out, on every rank, with gradients of exactly zero; the others match the oracle."""
    members = responses()
    members[6].mask[33] = 1
    members[6].log_probs.requires_grad_(False)[33] = math.nan
    members[6].log_probs.requires_grad_()
    expected = {
        name: Expected.of(members, OBJECTIVES[name], MICRO_BATCHES[0])
        for name in ("fipo_entropy_bonus", "fipo_tis")
    }
    assert all(oracle.result.kept[6] is False for oracle in expected.values())
    ranks = run_ranks(cp, _poison)
    for case in range(12):
        name, found = ranks[0][case][0], [result[case][1] for result in ranks]
        assert_same(found, expected[name])
        _, gradients, per_row, statistics = gather(found)
        assert {gradients[6, t] for t in members[6].tokens} == {0.0}
        assert statistics["policy/nonfinite_sequences"] == 1
        assert statistics["policy/dropped_sequences"] == 1
        assert all(math.isfinite(value) for value in statistics.values())
        assert all(math.isfinite(value) for values in per_row.values() for value in values.values())


def _nothing_kept(rank: int, world_size: int) -> list:
    found = []
    for name in OBJECTIVES:
        members = random_responses(5, [40, 6])
        for response in members:
            plant_dual_clipped(response, -1.0, [0, 5])
        with torch.no_grad():
            members[0].log_probs[0] = members[1].log_probs[0] = math.nan
        members[0].mask[0] = members[1].mask[0] = 1
        found.append(mini_batch(rank, world_size, members, OBJECTIVES[name], [[0, 1]]))
    empty = Response(*torch.zeros(7, 12, dtype=torch.float64).unbind())
    found += [mini_batch(rank, world_size, [empty], OBJECTIVES[name], [[0]]) for name in OBJECTIVES]
    return found


@pytest.mark.parametrize("cp", [1, 2])
def test_nothing_kept_and_nothing_there(cp) -> None:
    """Loss 0 with a gradient of 0 (not NaN), on ranks with rows and on ranks without."""
    ranks = run_ranks(cp, _nothing_kept)
    for case in range(2 * len(OBJECTIVES)):
        loss, gradients, _, statistics = gather([result[case] for result in ranks])
        assert loss == 0.0
        assert set(gradients.values()) <= {0.0}
        assert statistics["policy/kept_tokens"] == 0
        assert all(math.isfinite(value) for value in statistics.values())


def test_equal_log_probs_make_fipo_dapo() -> None:
    """In the first mini-step FutureKL is exactly 0 and every weight exactly 1."""
    members = random_responses(2, [50, 9])
    rows, _ = packed_rows(members, [0, 0], zigzag([50, 9], 1), 0)
    gradients = []
    for name in ("fipo", "dapo"):
        log_probs = rows.old_log_probs.clone().requires_grad_()
        result = policy_loss(log_probs, None, rows, ObjectiveConfig(name=name))
        result.loss_sum.backward()
        assert not result.future_kl.any()
        assert (result.influence_weights == 1).all()
        assert log_probs.grad is not None
        gradients.append(log_probs.grad)
    assert torch.equal(gradients[0], gradients[1])


def unsafe_token(kernels: str) -> None:
    """One token of negative advantage with ratio 4, then tokens that became less likely: e^F is far below 0.8."""
    (member,) = random_responses(2, [3])
    member.mask[:] = 1
    with torch.no_grad():
        member.log_probs.copy_(member.old_log_probs + torch.tensor([math.log(4), -3.0, -3.0]))
    member.advantages = -torch.ones_like(member.advantages)
    rows, _ = packed_rows([member], [0], zigzag([3], 1), 0)
    log_probs = rows.old_log_probs + torch.tensor([math.log(4), -3.0, -3.0], dtype=torch.float64)
    objective = ObjectiveConfig(influence_clip=None, safety_threshold=3.0)
    expected = oracle_loss([member], objective)
    result = policy_loss(log_probs.requires_grad_(), None, rows, objective, kernels=kernels)
    assert result.influence_weights[0] == pytest.approx(0.8)  # the low bound of the safety rule
    assert result.influence_weights[1] < 0.1  # its ratio is safe
    assert result.influence_weights.tolist() == pytest.approx(expected.influence_weights[0].tolist())
    assert (result.loss_sum / result.normalizer).item() == pytest.approx(expected.loss.item())


def test_the_safety_rule_has_a_low_bound() -> None:
    unsafe_token("torch")


def test_log_ratios_beyond_twenty_have_no_gradient() -> None:
    members = random_responses(2, [4], drift=0.0, outliers=0.0)
    members[0].mask[:] = 1
    rows, _ = packed_rows(members, [0], zigzag([4], 1), 0)
    log_probs = (rows.old_log_probs + torch.tensor([21.0, -21.0, 0.1, 0.0])).requires_grad_()
    rows = replace(rows, advantages=torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    policy_loss(log_probs, None, rows, ObjectiveConfig(name="dapo")).loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.bool().tolist() == [False, False, True, True]


def test_entropy_without_a_bonus_gets_no_gradient() -> None:
    members = random_responses(2, [20])
    rows, _ = packed_rows(members, [0], zigzag([20], 1), 0)
    log_probs = rows.old_log_probs.clone().requires_grad_()
    entropy = torch.ones_like(log_probs).requires_grad_()
    policy_loss(log_probs, entropy, rows, ObjectiveConfig()).loss_sum.backward()
    assert entropy.grad is None


def test_bad_inputs_are_named() -> None:
    members = random_responses(2, [20])
    rows, _ = packed_rows(members, [0], zigzag([20], 1), 0)
    count = rows.plan.num_rows
    log_probs = rows.old_log_probs
    cases = {
        "log_probs must be float32 or float64, not torch.bfloat16": (
            log_probs.bfloat16(),
            None,
            rows,
            ObjectiveConfig(),
        ),
        rf"log_probs has shape \[{count - 1}\], but the plan has {count} rows": (
            log_probs[1:],
            None,
            rows,
            ObjectiveConfig(),
        ),
        rf"entropy has shape \[1\], but the plan has {count} rows": (
            log_probs,
            log_probs[:1],
            rows,
            ObjectiveConfig(),
        ),
        "advantages has shape": (log_probs, None, replace(rows, advantages=log_probs[1:]), ObjectiveConfig()),
        "response_length has shape": (
            log_probs,
            None,
            replace(rows, response_length=torch.ones(2)),
            ObjectiveConfig(),
        ),
        "have no reference_log_probs": (
            log_probs,
            None,
            replace(rows, reference_log_probs=None),
            ObjectiveConfig(name="grpo", kl_coefficient=0.1),
        ),
        "entropy_coefficient is 0.1, but no entropy": (
            log_probs,
            None,
            rows,
            ObjectiveConfig(entropy_coefficient=0.1),
        ),
        r"rollout_log_probs has shape \[1\]": (
            log_probs,
            None,
            replace(rows, rollout_log_probs=log_probs[:1]),
            ObjectiveConfig(),
        ),
        "correction is mis, but the rows have no rollout_log_probs": (
            log_probs,
            None,
            replace(rows, rollout_log_probs=None),
            ObjectiveConfig(correction="mis"),
        ),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            policy_loss(*arguments)
