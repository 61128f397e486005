"""FutureKL and the policy loss on the device, by Triton's kernels and by torch, against float64 on the CPU."""

from collections.abc import Callable

import pytest
import torch

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.future_kl import scan_future_kl
from tests.gpu.compare import Errors, largest_difference, poison, relative_norm, require
from tests.gpu.loss_inputs import FIPO, OBJECTIVES, LossInputs, loss_and_gradients, random_loss_inputs
from tools.bench.harness import Bench

pytestmark = pytest.mark.gpu
both_kernels = pytest.mark.parametrize("kernels", ["triton", "torch"])
TOLERANCES = {"gradient": 1e-5, "F": 1e-5, "influence": 1e-5, "statistics": 2e-5}
"""Relative norm; largest difference of F, of weights, of a statistic, each relative to the largest value (at least 1)."""
SHAPES = {
    "1 x 20,480": ([20_480], [700], 1),
    "4 x 5,120": ([5_120] * 4, [175] * 4, 1),
    "lengths 1 to 300": (list(range(1, 301)), list(range(1, 12)), 1),
    "127, 128, 129, 1": ([127, 128, 129, 1], [127, 128, 129, 1], 1),
    "20,480 and 900, each in 4 pieces": ([20_480, 900], [700, 90], 4),
    # More blocks than the GPU has multiprocessors, and the largest tables.
    "32 x 20,480": ([20_480] * 32, [150] * 3, 1),
}
"""Lengths, lengths in a rehearsal, pieces: the recipe's, ragged packs, blocks that end with sequences, sequences in pieces."""
REPEATS = 50


def check_loss(bench: Bench, inputs: LossInputs, objective: ObjectiveConfig, kernels: str) -> Errors:
    """Errors against float64. AssertionError if rows, normalizer or a statistic differ."""
    truth, true_gradients = loss_and_gradients(inputs.double(), objective, "torch")
    require(truth.normalizer.item() > 0, "these inputs prove nothing: no response is kept")
    _poison(bench, inputs)
    loss, gradients = loss_and_gradients(inputs.to(bench.device), objective, kernels)
    reported, expected = loss.statistics.finalize(), truth.statistics.finalize()
    difference = {name: _difference(reported[name], expected[name]) for name in expected}
    worst = max(difference, key=lambda name: difference[name])
    require(torch.equal(loss.kept.cpu().double(), truth.kept), "other rows are kept than in float64")
    found, true = loss.normalizer.item(), truth.normalizer.item()
    require(found == true, f"normalizer {found}, not {true}")
    require(
        difference[worst] <= TOLERANCES["statistics"], f"{worst} is {reported[worst]}, not {expected[worst]}"
    )
    return {
        "gradient": max(relative_norm(g, t) for g, t in zip(gradients, true_gradients, strict=True)),
        "F": largest_difference(loss.future_kl, truth.future_kl),
        "influence": largest_difference(loss.influence_weights, truth.influence_weights),
        "statistics": difference[worst],
    }


def _difference(value: float, reference: float) -> float:
    error = abs(value - reference) / max(1.0, abs(reference))
    return error if error == error else float("inf")


def _poison(bench: Bench, inputs: LossInputs) -> None:
    rows, blocks = len(inputs.log_probs), inputs.rows.plan.num_blocks
    poison(bench, {torch.float32: [rows] * 2, torch.float64: [blocks, 2 * blocks, 27 * blocks]})


@pytest.mark.parametrize("shape", SHAPES)
@both_kernels
def test_many_shapes(bench: Bench, record_errors: Callable, kernels: str, shape: str) -> None:
    full, toy, chunks = SHAPES[shape]
    inputs = random_loss_inputs(bench.pick(full, toy), list(SHAPES).index(shape), chunks=chunks)
    record_errors(check_loss(bench, inputs, FIPO, kernels), TOLERANCES)


@pytest.mark.parametrize("objective", OBJECTIVES)
@both_kernels
def test_every_objective(bench: Bench, record_errors: Callable, kernels: str, objective: str) -> None:
    lengths, seed = bench.pick([5_000, 1, 700, 3_000], [150, 1, 40]), 20 + list(OBJECTIVES).index(objective)
    inputs = random_loss_inputs(lengths, seed, objective=OBJECTIVES[objective])
    record_errors(check_loss(bench, inputs, OBJECTIVES[objective], kernels), TOLERANCES)


def non_finite_inputs(bench: Bench) -> LossInputs:
    """Four responses, of which one has a NaN and one an infinity."""
    inputs = random_loss_inputs(bench.pick([900, 2_000, 300, 40], [60, 200, 30, 5]), 31)
    sequence = inputs.rows.plan.row_sequence
    for index, value in ((1, torch.nan), (3, torch.inf)):
        rows = (sequence == index).nonzero().flatten()
        inputs.log_probs[rows[len(rows) // 2]] = value
    return inputs


@both_kernels
def test_nan_and_infinity_exclude_their_own_response(
    bench: Bench, record_errors: Callable, kernels: str
) -> None:
    record_errors(check_loss(bench, non_finite_inputs(bench), FIPO, kernels), TOLERANCES)


@both_kernels
def test_no_rows(bench: Bench, record_errors: Callable, kernels: str) -> None:
    """A micro-batch without a response token: loss 0, nothing counted, and backward runs."""
    inputs = random_loss_inputs([5, 9], 41, holes=2.0).to(bench.device)
    loss, gradients = loss_and_gradients(inputs, FIPO, kernels)
    require(loss.normalizer.item() == 0, "something was counted")
    require(gradients[0].shape == (0,), f"the gradient has shape {list(gradients[0].shape)}")
    record_errors({"loss": abs(loss.loss_sum.item())}, {"loss": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("half_life", [0.1, 32.0, 4_000.0, float("inf")])
@both_kernels
def test_scan_alone(
    bench: Bench, record_errors: Callable, kernels: str, half_life: float, dtype: torch.dtype
) -> None:
    """`scan_future_kl` with additional sums."""
    inputs = random_loss_inputs(bench.pick([20_480, 300, 1, 5_000], [400, 30, 1]), 51, chunks=2)
    plan, x = inputs.rows.plan, inputs.log_probs - inputs.rows.old_log_probs
    counts = (torch.arange(len(x) * 2).view(-1, 2) % 3 == 0).float()
    truth, totals = scan_future_kl(x.double(), counts, plan, half_life, kernels="torch")
    given = x.to(bench.device, dtype), counts.to(bench.device), plan.to(bench.device)
    future_kl, found = scan_future_kl(*given, half_life, kernels=kernels)
    require(torch.equal(found.cpu(), totals), "the additional sums differ")
    kind = str(dtype).removeprefix("torch.")
    record_errors({kind: largest_difference(future_kl, truth)}, {"float32": 1e-6, "float64": 1e-12})


@both_kernels
def test_same_bits_at_every_launch(bench: Bench, kernels: str) -> None:
    """A race between programs shows as bits that change from launch to launch."""
    lengths, repeats = bench.pick(([20_480] * 8 + [777] * 40, REPEATS), ([200, 77], 3))
    inputs = random_loss_inputs(lengths, 61).to(bench.device)
    first = _bits(inputs, kernels)
    for repeat in range(1, repeats):
        _poison(bench, inputs)
        again = _bits(inputs, kernels)
        moved = [name for name, value in first.items() if not torch.equal(value, again[name])]
        require(not moved, f"{', '.join(moved)} differ between launch 1 and launch {repeat + 1}")


def _bits(inputs: LossInputs, kernels: str) -> dict[str, torch.Tensor]:
    loss, gradients = loss_and_gradients(inputs, FIPO, kernels)
    values = {
        "gradient": gradients[0],
        "loss": loss.loss_sum,
        "F": loss.future_kl,
        "influence weight": loss.influence_weights,
        "sums": loss.statistics.sums,
        "maxima": loss.statistics.maxima,
    }
    return {name: value.detach().clone() for name, value in values.items()}
