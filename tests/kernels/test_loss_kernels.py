"""The Triton scan and policy loss: against the definition, the oracle and the authors' numbers, and against the torch path."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo import fipo_loss
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.kernels import launch
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows
from megatron_fipo.objective.scan_layout import ALL_GATHER, ChunkTable
from tests.objective.oracle import future_kl_by_definition
from tests.objective.packed import (
    contiguous,
    packed_rows,
    random_case,
    random_responses,
    scan_ranks,
    scattered,
    zigzag,
)
from tests.objective.test_golden import FILES, load
from tests.objective.test_loss import (
    OBJECTIVES,
    Expected,
    assert_same,
    count_collectives,
    mini_batch,
    responses,
    unsafe_token,
)
from tests.ranks import run_ranks

HALF_LIVES = st.sampled_from([1e-300, 1e-3, 0.5, 32.0, math.inf])
LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(
    lengths=LENGTHS,
    half_life=HALF_LIVES,
    cp=st.integers(1, 3),
    chunks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_cut_gives_the_definition(lengths, half_life, cp, chunks, seed) -> None:
    values, masks = random_case(seed, lengths)
    found = scan_ranks(scattered(lengths, cp, chunks, seed), values, masks, half_life, kernels="triton")
    for x, mask, f in zip(values, masks, found, strict=True):
        expected = future_kl_by_definition(torch.from_numpy(x), half_life).numpy()
        np.testing.assert_allclose(f[mask], expected[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2])
def test_blocks_are_added_tile_by_tile(tile, cp, monkeypatch) -> None:
    """A program adds TILE blocks at a time; here several times, with and without a remainder, in a chunk and over later chunks."""
    monkeypatch.setattr(launch, "TILE", tile)
    lengths = [128 * 20, 128 * 16 + 1, 70]
    values, masks = random_case(3, lengths)
    found = scan_ranks(contiguous(lengths, cp), values, masks, 500.0, kernels="triton")
    for x, mask, f in zip(values, masks, found, strict=True):
        expected = future_kl_by_definition(torch.from_numpy(x), 500.0).numpy()
        np.testing.assert_allclose(f[mask], expected[mask], rtol=1e-12, atol=1e-12)


ORACLE_CASES = [
    (name, [[0], [1, 2], [3, 4, 5, 6], [7]] if name == "fipo_reference" else [list(range(8))])
    for name in OBJECTIVES
]


def _grid(rank: int, world_size: int, layout) -> list:
    members = responses()
    return [
        mini_batch(rank, world_size, members, OBJECTIVES[name], batches, layout, "triton")
        for name, batches in ORACLE_CASES
    ]


@pytest.mark.parametrize(("cp", "layout"), [(1, zigzag), (2, zigzag), (3, contiguous)])
def test_no_split_changes_loss_or_gradient(cp, layout) -> None:
    """Every objective in float64: the oracle's loss and its gradient of every token, to 1e-10."""
    results = run_ranks(cp, _grid, layout)
    members = responses()
    for case, (name, batches) in enumerate(ORACLE_CASES):
        assert_same([result[case] for result in results], Expected.of(members, OBJECTIVES[name], batches))


@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * f.stem.startswith("long")) for f in FILES]
)
def test_matches_the_reference(file) -> None:
    golden, config = load(file)
    tolerance = 1e-9 if golden["logprobs"].dtype == torch.float64 else 1e-5
    log_probs = golden["logprobs"].requires_grad_()
    given = (golden["old_logprobs"], golden["advantages"], golden["response_mask"], config)
    result = fipo_loss(log_probs, *given, kernels="triton")
    result.loss.backward()
    tokens = golden["loss_mask"].sum()
    smoothing = tokens / (tokens + 1e-8)  # the authors add 1e-8 to the token count
    torch.testing.assert_close(
        result.loss * smoothing, golden["loss"].to(result.loss.dtype), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(log_probs.grad * smoothing, golden["grad"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.future_kl, golden["future_kl"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        result.influence_weights, golden["influence_weights"], rtol=tolerance, atol=tolerance
    )
    assert torch.equal(result.loss_mask, golden["loss_mask"].to(result.loss_mask.dtype))


def _rows(dtype: torch.dtype, mask: bool) -> PolicyRows:
    members = random_responses(21, [200, 3, 150, 40], outliers=0.03)
    rows, _ = packed_rows(members, [5, 6, 0, 3], zigzag([205, 9, 150, 43], 1), 0)
    if mask:
        rows = replace(
            rows, mask=torch.rand(rows.plan.num_rows, generator=torch.Generator().manual_seed(4)) > 0.3
        )
    values = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(
        rows,
        **{
            k: v.to(dtype) for k, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
        },
    )


def _both(
    rows: PolicyRows, objective: ObjectiveConfig, log_probs: torch.Tensor, entropy: torch.Tensor | None
):
    """(result, gradient of log-probs, gradient of entropy) of the torch path and of the kernels."""
    found: list[tuple[PolicyLoss, torch.Tensor, torch.Tensor | None]] = []
    for kernels in ("torch", "triton"):
        x = log_probs.clone().requires_grad_()
        e = None if entropy is None else entropy.clone().requires_grad_()
        result = policy_loss(x, e, rows, objective, kernels=kernels)
        (3.0 * result.loss_sum).backward()
        found.append((result, x.grad, None if e is None else e.grad))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("spoil", [False, True])
def test_every_output_equals_the_torch_path(name, spoil) -> None:
    """Gradients of both inputs, per-row outputs, and every statistic; also where numbers are not finite and rows are masked."""
    rows, objective = _rows(torch.float64, mask=spoil), OBJECTIVES[name]
    random = torch.Generator().manual_seed(9)
    delta = torch.randn(rows.plan.num_rows, generator=random, dtype=torch.float64)
    delta[[10, 60, 200, 310]] = torch.tensor(
        [25.0, -25.0, -25.0, -25.0], dtype=torch.float64
    )  # beyond the clamp: no gradient
    log_probs, entropy = rows.old_log_probs + delta, delta.abs()
    if spoil:
        log_probs[30], rows.rollout_log_probs[80] = math.nan, -math.inf
    (a, grad_a, entropy_a), (b, grad_b, entropy_b) = _both(rows, objective, log_probs, entropy)
    torch.testing.assert_close(grad_b, grad_a, rtol=1e-12, atol=1e-14)
    if objective.entropy_coefficient:
        assert entropy_a.abs().max() > 0
        torch.testing.assert_close(entropy_b, entropy_a, rtol=1e-12, atol=1e-14)
    for output in ("loss_sum", "normalizer", "influence_weights", "future_kl", "kept"):
        torch.testing.assert_close(getattr(b, output), getattr(a, output), rtol=1e-12, atol=1e-12, msg=output)
    torch.testing.assert_close(b.statistics.sums, a.statistics.sums, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(b.statistics.maxima, a.statistics.maxima, rtol=1e-12, atol=1e-12)
    assert (a.statistics.tensors()["policy/nonfinite_sequences"] > 0) == spoil


def test_float32_is_as_close_as_float32_can_be() -> None:
    rows = _rows(torch.float32, mask=False)
    log_probs = rows.old_log_probs + 0.2 * torch.randn(
        rows.plan.num_rows, generator=torch.Generator().manual_seed(1)
    )
    (a, grad_a, _), (b, grad_b, _) = _both(rows, OBJECTIVES["fipo"], log_probs, None)
    assert grad_b.dtype == b.future_kl.dtype == torch.float32
    torch.testing.assert_close(grad_b, grad_a, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(b.statistics.sums, a.statistics.sums, rtol=1e-6, atol=1e-6)


def test_no_rows_and_no_group() -> None:
    """A rank without rows still folds, gathers, and has a graph to run backward through."""
    rows, _ = packed_rows(random_responses(0, [5]), [3], zigzag([2000], 4), 3)
    assert rows.plan.num_rows == 0
    rows = replace(
        rows,
        plan=replace(rows.plan, chunk_distance=rows.plan.chunk_distance[:1], is_later=rows.plan.is_later[:1]),
    )
    log_probs = rows.old_log_probs.clone().requires_grad_()
    result = policy_loss(log_probs, None, rows, ObjectiveConfig(), kernels="triton")
    result.loss_sum.backward()
    assert result.loss_sum == result.normalizer == 0
    assert log_probs.grad.shape == (0,)
    assert result.statistics.maxima.tolist() == [-math.inf] * 3


def test_a_chunk_table_may_lie_in_memory_as_it_likes() -> None:
    values, masks = random_case(3, [200, 90, 30])
    table = scattered([200, 90, 30], 2, 3, 1)
    turned = ChunkTable(np.asfortranarray(table.first), np.asfortranarray(table.length))
    found = (scan_ranks(given, values, masks, 32.0, kernels="triton") for given in (table, turned))
    for expected, f in zip(*found, strict=True):
        np.testing.assert_array_equal(f, expected)


def test_an_empty_batch_is_a_loss_of_nothing() -> None:
    nothing = torch.empty(0, 5)
    result = fipo_loss(nothing, nothing, nothing, nothing, kernels="triton")
    assert result.loss == 0
    assert result.statistics["influence/max"] == 0


def test_backward_makes_nothing_but_the_gradient() -> None:
    rows = _rows(torch.float32, mask=False)
    log_probs = rows.old_log_probs.clone().requires_grad_()
    loss = policy_loss(log_probs, None, rows, ObjectiveConfig(), kernels="triton").loss_sum
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(loss, log_probs)
    assert sorted(made) == ["mul", "ones_like"]


@pytest.mark.parametrize("cp", [2, 4])
def test_one_all_gather_of_constant_size(cp) -> None:
    for calls in run_ranks(cp, count_collectives, 300, "none", "triton"):
        assert calls == [(ALL_GATHER, 3 * 32)]


def test_riders_are_summed_over_each_sequence() -> None:
    rows = _rows(torch.float64, mask=False)
    x = torch.randn(rows.plan.num_rows, dtype=torch.float64)
    extra_sums = torch.randn(rows.plan.num_rows, 3, dtype=torch.float64)
    expected, totals = scan_future_kl(x, extra_sums, rows.plan, 8.0, kernels="torch")
    found, found_totals = scan_future_kl(x, extra_sums, rows.plan, 8.0, kernels="triton")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_totals, totals, rtol=1e-12, atol=1e-12)


def test_the_ratio_at_its_bounds_has_the_gradient_of_torch() -> None:
    """Ties of the clipped and the unclipped loss, and of the dual clip, at float32 numbers that hit them exactly."""
    rows = _rows(torch.float32, mask=False)
    bounds = torch.tensor([0.5, 2.0, 4.0]).log()
    log_probs = rows.old_log_probs.zero_() + bounds[torch.arange(rows.plan.num_rows) % 3]
    objective = ObjectiveConfig(clip_low=0.5, clip_high=1.0, dual_clip=4.0, drop_dual_clipped=False)
    (_, grad_a, _), (_, grad_b, _) = _both(rows, objective, log_probs, None)
    torch.testing.assert_close(grad_b, grad_a, rtol=1e-6, atol=1e-7)


def test_the_safety_rule_has_a_low_bound() -> None:
    unsafe_token("triton")
