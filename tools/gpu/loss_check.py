"""FutureKL and the policy loss on the device, by Triton's kernels and by torch, against float64 on the CPU."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from gpu.compare import Errors, largest_difference, one_row, poison, relative_norm, require, within
from gpu.loss_inputs import LossInputs, random_loss_inputs
from gpu.measure import Bench
from gpu.report import Row
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss

SECTION = "loss"
KERNELS = ("triton", "torch")
FIPO = ObjectiveConfig(influence_clip=(0.8, 1.2))
OBJECTIVES = {
    "fipo": FIPO,
    "fipo, reference mean, bonus, tis": ObjectiveConfig(
        normalization="reference_micro_batch", entropy_coefficient=0.01, correction="tis"
    ),
    "fipo, no clip, half life 500": ObjectiveConfig(half_life=500.0, influence_clip=None),
    "dapo": ObjectiveConfig("dapo"),
    "grpo, KL, mis": ObjectiveConfig("grpo", kl_coefficient=0.1, correction="mis"),
}
TOLERANCES = {"gradient": 1e-5, "F": 1e-5, "influence": 1e-5, "statistics": 2e-5}
"""Relative norm; largest difference of F, of weights, of a statistic, each relative to the largest value (at least 1)."""
REPEATS = 50


def loss_and_gradients(
    inputs: LossInputs, objective: ObjectiveConfig, kernels: str
) -> tuple[PolicyLoss, list[torch.Tensor]]:
    """The loss, and the gradient by log-probs and (with a bonus) by entropy."""
    log_probs = inputs.log_probs.detach().requires_grad_()
    bonus = objective.entropy_coefficient != 0
    entropy = inputs.entropy.detach().requires_grad_(bonus)
    loss = policy_loss(log_probs, entropy, inputs.rows, objective, None, kernels=kernels)
    gradients = torch.autograd.grad(loss.loss_sum, [log_probs, entropy] if bonus else [log_probs])
    return loss, list(gradients)


def check_loss(bench: Bench, inputs: LossInputs, objective: ObjectiveConfig, kernels: str) -> Errors:
    truth, true_gradients = loss_and_gradients(inputs.double(), objective, "torch")
    require(truth.normalizer.item() > 0, "these inputs prove nothing: no response is kept")
    _poison(bench, inputs)
    loss, gradients = loss_and_gradients(inputs.to(bench.device), objective, kernels)
    reported, expected = loss.statistics.finalize(), truth.statistics.finalize()
    difference = {name: _difference(reported[name], expected[name]) for name in expected}
    worst = max(difference, key=lambda name: difference[name])
    require(torch.equal(loss.kept.cpu().double(), truth.kept), "other rows are kept than in float64")
    require(
        loss.normalizer.item() == truth.normalizer.item(),
        f"normalizer {loss.normalizer.item()}, not {truth.normalizer.item()}",
    )
    require(
        difference[worst] <= TOLERANCES["statistics"], f"{worst} is {reported[worst]}, not {expected[worst]}"
    )
    errors = {
        "gradient": max(relative_norm(g, t) for g, t in zip(gradients, true_gradients, strict=True)),
        "F": largest_difference(loss.future_kl, truth.future_kl),
        "influence": largest_difference(loss.influence_weights, truth.influence_weights),
        "statistics": difference[worst],
    }
    return within(errors, TOLERANCES)


def _difference(value: float, reference: float) -> float:
    error = abs(value - reference) / max(1.0, abs(reference))
    return error if error == error else float("inf")


def _poison(bench: Bench, inputs: LossInputs) -> None:
    rows, blocks = len(inputs.log_probs), inputs.rows.plan.num_blocks
    poison(bench, {torch.float32: [rows] * 2, torch.float64: [blocks, 2 * blocks, 27 * blocks]})


def _rows(name: str, checks: Callable[[str], Mapping[str, Callable[[], Errors]]]) -> Iterator[Row]:
    for kernels in KERNELS:
        yield one_row(SECTION, f"{name}, {kernels}", checks(kernels))


def many_shapes(bench: Bench) -> Iterator[Row]:
    """The recipe's lengths, ragged packs, blocks that end where sequences do, and sequences cut into pieces."""
    long = bench.pick(20_480, 700)
    shapes = {
        f"1 x {long:,}": ([long], 1),
        f"4 x {long // 4:,}": ([long // 4] * 4, 1),
        "lengths 1 to 300": (list(range(1, bench.pick(301, 12))), 1),
        "127, 128, 129, 1": ([127, 128, 129, 1], 1),
        f"{long:,} and 900, each in 4 pieces": ([long, bench.pick(900, 90)], 4),
        # More blocks than the GPU has multiprocessors, and the largest tables.
        f"32 x {long:,}": ([bench.pick(long, 150)] * bench.pick(32, 3), 1),
    }
    inputs = {
        name: random_loss_inputs(lengths, seed, chunks=chunks)
        for seed, (name, (lengths, chunks)) in enumerate(shapes.items())
    }
    yield from _rows(
        "shapes", lambda kernels: {n: partial(check_loss, bench, i, FIPO, kernels) for n, i in inputs.items()}
    )


def every_objective(bench: Bench) -> Iterator[Row]:
    lengths = bench.pick([5_000, 1, 700, 3_000], [150, 1, 40])
    inputs = {
        n: random_loss_inputs(lengths, 20 + seed, objective=o)
        for seed, (n, o) in enumerate(OBJECTIVES.items())
    }
    yield from _rows(
        "objectives",
        lambda kernels: {n: partial(check_loss, bench, inputs[n], o, kernels) for n, o in OBJECTIVES.items()},
    )


def non_finite(bench: Bench) -> Iterator[Row]:
    """NaN and infinity leave their own response out, in values, gradients and statistics."""
    inputs = random_loss_inputs(bench.pick([900, 2_000, 300, 40], [60, 200, 30, 5]), 31)
    sequence = inputs.rows.plan.row_sequence
    for index, value in ((1, torch.nan), (3, torch.inf)):
        rows = (sequence == index).nonzero().flatten()
        inputs.log_probs[rows[len(rows) // 2]] = value
    yield from _rows(
        "NaN and infinity",
        lambda kernels: {"2 of 4 responses": partial(check_loss, bench, inputs, FIPO, kernels)},
    )


def no_rows(bench: Bench) -> Iterator[Row]:
    """A micro-batch without a response token: loss 0, nothing counted, and backward runs."""
    inputs = random_loss_inputs([5, 9], 41, holes=2.0).to(bench.device)

    def check(kernels: str) -> Errors:
        loss, gradients = loss_and_gradients(inputs, FIPO, kernels)
        require(loss.normalizer.item() == 0, "something was counted")
        require(gradients[0].shape == (0,), f"the gradient has shape {list(gradients[0].shape)}")
        return within({"loss": abs(loss.loss_sum.item())}, {"loss": 0.0})

    yield from _rows("no rows", lambda kernels: {"empty batch": partial(check, kernels)})


def scan_alone(bench: Bench) -> Iterator[Row]:
    """`scan_future_kl` with riders, several half lives, float32 and float64."""
    inputs = random_loss_inputs(bench.pick([20_480, 300, 1, 5_000], [400, 30, 1]), 51, chunks=2)
    plan, x = inputs.rows.plan, inputs.log_probs - inputs.rows.old_log_probs
    riders = (torch.arange(len(x) * 2).view(-1, 2) % 3 == 0).float()
    placed = plan.to(bench.device)

    def check(half_life: float, dtype: torch.dtype, kernels: str) -> Errors:
        truth, totals = scan_future_kl(x.double(), riders, plan, half_life, kernels="torch")
        given = x.to(bench.device, dtype), riders.to(bench.device), placed
        future_kl, found = scan_future_kl(*given, half_life, kernels=kernels)
        require(torch.equal(found.cpu(), totals), "riders add up to something else")
        kind = str(dtype).removeprefix("torch.")
        return within({kind: largest_difference(future_kl, truth)}, {"float32": 1e-6, "float64": 1e-12})

    cases = [
        (half_life, dtype)
        for half_life in (0.1, 32.0, 4_000.0, float("inf"))
        for dtype in (torch.float32, torch.float64)
    ]
    yield from _rows(
        "scan alone", lambda kernels: {f"half life {h}, {d}": partial(check, h, d, kernels) for h, d in cases}
    )


def same_bits(bench: Bench) -> Iterator[Row]:
    """A race between programs shows as bits that move from launch to launch."""
    lengths, repeats = bench.pick(([20_480] * 8 + [777] * 40, REPEATS), ([200, 77], 3))
    inputs = random_loss_inputs(lengths, 61).to(bench.device)

    def check(kernels: str) -> Errors:
        first = _bits(inputs, kernels)
        for repeat in range(1, repeats):
            _poison(bench, inputs)
            again = _bits(inputs, kernels)
            moved = [name for name, value in first.items() if not torch.equal(value, again[name])]
            require(not moved, f"{', '.join(moved)} differ between launch 1 and launch {repeat + 1}")
        return {f"moving bits in {repeats} launches": 0.0}

    yield from _rows("same bits", lambda kernels: {"launches": partial(check, kernels)})


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


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "shapes": many_shapes,
    "objectives": every_objective,
    "NaN and infinity": non_finite,
    "no rows": no_rows,
    "scan alone": scan_alone,
    "same bits": same_bits,
}
