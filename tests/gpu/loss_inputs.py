"""Random rows for the loss, float32 on the CPU, for which every comparison in the loss is the same in float32 and float64.

Log-probs are multiples of 2⁻¹⁴, so that their differences are exact; log-ratios keep a distance from the bounds at which
the loss jumps (the clips, the safety threshold, the dual clip), so that no rounding of the exponential crosses one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss, PolicyRows
from megatron_fipo.objective.scan_layout import ChunkTable, ScanPlan, build_scan_plan

FIPO = ObjectiveConfig(influence_clip=(0.8, 1.2))
OBJECTIVES = {
    "fipo": FIPO,
    "fipo, reference mean, bonus, tis": ObjectiveConfig(
        normalization="reference_micro_batch", entropy_coefficient=0.01, correction="tis"
    ),
    "fipo, no clip, half life 500": ObjectiveConfig(half_life=500.0, influence_clip=None),
    "dapo": ObjectiveConfig(name="dapo"),
    "grpo, KL, mis": ObjectiveConfig(name="grpo", kl_coefficient=0.1, correction="mis"),
    "fipo, no filter": ObjectiveConfig(influence_clip=None, filter_future_kl=False),
}
GRID = 2.0**14
MARGIN = 1e-3


@dataclass(frozen=True)
class LossInputs:
    """Arguments of `policy_loss`, [R] each."""

    log_probs: Tensor
    entropy: Tensor
    rows: PolicyRows

    def to(self, device: torch.device) -> "LossInputs":
        """A copy on `device`, in memory of its own."""
        rows = self.rows.to(device)
        if device.type == self.log_probs.device.type:
            rows = _each(rows, lambda value: value.clone())
        return LossInputs(self.log_probs.to(device, copy=True), self.entropy.to(device, copy=True), rows)

    def double(self) -> "LossInputs":
        rows = _each(self.rows, lambda value: value.double() if value.is_floating_point() else value)
        return LossInputs(self.log_probs.double(), self.entropy.double(), rows)

    @property
    def bytes_moved(self) -> int:
        """Of forward and gradient, at least: each input once; gradient, weights, FutureKL and kept rows once."""
        rows, plan = self.rows, self.rows.plan
        given = [self.log_probs, self.entropy, rows.old_log_probs, rows.advantages, rows.last_row]
        given += [
            value
            for value in (rows.reference_log_probs, rows.rollout_log_probs, rows.mask)
            if value is not None
        ]
        return sum(value.nbytes for value in given) + plan_bytes(plan) + 4 * self.log_probs.nbytes


def plan_bytes(plan: ScanPlan) -> int:
    """What a scan has to read of its plan: per row its slot and, if sequences are in pieces, its distance to the piece's end."""
    in_pieces = plan.chunk_distance.numel() != plan.num_sequences
    return plan.slot_row.nbytes + (plan.row_distance.nbytes if in_pieces else 0)


def _each(rows: PolicyRows, change: Callable[[Tensor], Tensor]) -> PolicyRows:
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(
        rows, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    )


def random_loss_inputs(
    lengths: Sequence[int],
    seed: int,
    *,
    chunks: int = 1,
    holes: float = 0.1,
    objective: ObjectiveConfig | None = None,
) -> LossInputs:
    """Responses of the given lengths, each after a prompt of a few tokens; a share `holes` of their tokens are not rows.

    `chunks`: pieces into which every sequence is cut at random positions, out of order, as context parallelism does, on one
    rank. The first response is always kept.
    """
    random = np.random.default_rng(seed)
    prompts = random.integers(1, 40, len(lengths))
    table = _cut(prompts + np.asarray(lengths, dtype=np.int64), chunks, random)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(sum(lengths)) - np.repeat(starts, lengths) + prompts[sequence] - 1
    present = random.random(len(sequence)) >= holes
    sequence, position = sequence[present], position[present]
    count = len(sequence)
    old = _grid(-4 * random.random(count) - 0.1)
    settings = objective or ObjectiveConfig()
    bounds = [
        1 - settings.clip_low,
        1 + settings.clip_low,
        1 + settings.clip_high,
        settings.safety_threshold,
        settings.dual_clip,
    ]
    log_ratio = random.normal(0, 0.2, count)
    log_ratio[_outliers(sequence, random)] += 3.0
    log_ratio = _grid(_away_from(log_ratio, np.log(bounds)))
    last_row = np.zeros(count)
    row_count = np.bincount(sequence, minlength=len(lengths))
    last_row[np.cumsum(row_count)[row_count > 0] - 1] = 1
    rollout_gap = _grid(_away_from(random.normal(0, 0.5, count), np.log([2.0])))
    rows = PolicyRows(
        old_log_probs=_float(old),
        advantages=_float((random.normal(0.3, 1.0, len(lengths)))[sequence]),
        last_row=_float(last_row),
        response_length=_float(row_count),
        plan=build_scan_plan(table, 0, sequence, position),
        reference_log_probs=_float(old + _grid(random.normal(0, 0.2, count))),
        rollout_log_probs=_float(old - rollout_gap),
    )
    return LossInputs(_float(old + log_ratio), _float(random.random(count)), rows)


def _cut(lengths: np.ndarray, chunks: int, random: np.random.Generator) -> ChunkTable:
    first, length = np.zeros((2, 1, len(lengths), chunks), dtype=np.int64)
    for index, total in enumerate(lengths):
        starts = np.append(0, np.sort(random.integers(0, total + 1, chunks - 1)))
        order = random.permutation(chunks)
        first[0, index, order] = starts
        length[0, index, order] = np.diff(np.append(starts, total))
    return ChunkTable(first, length)


def _outliers(sequence: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows to put beyond the dual clip: 1, 2, 0, 1, 2, 0 … in a sequence; 2 drop it if its advantage is negative."""
    chosen = []
    for index in np.unique(sequence):
        rows = np.flatnonzero(sequence == index)
        chosen.append(random.choice(rows, min((index + 1) % 3, len(rows)), replace=False))
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _grid(values: np.ndarray) -> np.ndarray:
    return np.round(values * GRID) / GRID


def _away_from(values: np.ndarray, bounds: Sequence[float] | np.ndarray) -> np.ndarray:
    for bound in bounds:
        values = np.where(np.abs(values - bound) < MARGIN, bound + 2 * MARGIN, values)
    return values


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def loss_and_gradients(
    inputs: LossInputs, objective: ObjectiveConfig, kernels: str
) -> tuple[PolicyLoss, list[Tensor]]:
    """The loss, and the gradient by log-probs and (with a bonus) by entropy."""
    log_probs = inputs.log_probs.detach().requires_grad_()
    bonus = objective.entropy_coefficient != 0
    entropy = inputs.entropy.detach().requires_grad_(bonus)
    loss = policy_loss(log_probs, entropy, inputs.rows, objective, None, kernels=kernels)
    gradients = torch.autograd.grad(loss.loss_sum, [log_probs, entropy] if bonus else [log_probs])
    return loss, list(gradients)
