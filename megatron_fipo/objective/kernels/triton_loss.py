"""The policy loss as Triton kernels: two launches and the gather's one, the same numbers as the torch path.

    before the gather   loss_blocks_kernel   one program per block of 128 slots: its aggregate and its drop counts
                        chunk_sums_kernel    one program per sequence (`triton_scan.py`)
    after the gather    loss_rows_kernel     one program per block: F of each row, then everything that depends on it

Each kernel compiles once for all packs: no integer is specialized, nor the address of the entropies, which follow R log-probs
in one tensor.

Sums and exponentials are float64; per-row values have the dtype of the log-probs, float32 beside a model. There are no
atomics, so results are bitwise deterministic. Notation as in `triton_scan.py`.
"""

from typing import Any

import triton
import triton.language as tl

from megatron_fipo.objective.config import SAFE_INFLUENCE, ObjectiveConfig
from megatron_fipo.objective.kernels.triton_scan import block_rows, first_slot, future_kl_of_rows, suffix_scan
from megatron_fipo.objective.metrics import MAXIMA, SUMS

LIMIT = tl.constexpr(20.0)
"""LOG_RATIO_LIMIT; the launcher checks that they agree."""
LANES = tl.constexpr(32)
"""Sequences whose counts a program adds at one time: one for each thread of its warp."""
LOWEST = tl.constexpr(float("-inf"))

# Rows of `sums` and `maxima` by name. Triton puts constexpr globals into its cache key, so a moved row recompiles.
SUM_LOSS = tl.constexpr(SUMS.index("loss"))
SUM_NORMALIZER = tl.constexpr(SUMS.index("normalizer"))
SUM_TOKEN_MEAN_LOSS = tl.constexpr(SUMS.index("token_mean_loss"))
SUM_REFERENCE_LOSS = tl.constexpr(SUMS.index("reference_loss"))
SUM_SEQUENCES = tl.constexpr(SUMS.index("sequences"))
SUM_DROPPED_SEQUENCES = tl.constexpr(SUMS.index("dropped_sequences"))
SUM_NONFINITE_SEQUENCES = tl.constexpr(SUMS.index("nonfinite_sequences"))
SUM_TOKENS = tl.constexpr(SUMS.index("tokens"))
SUM_FINITE_TOKENS = tl.constexpr(SUMS.index("finite_tokens"))
SUM_KEPT_TOKENS = tl.constexpr(SUMS.index("kept_tokens"))
SUM_LOG_RATIO = tl.constexpr(SUMS.index("log_ratio"))
SUM_LOG_RATIO_SQUARED = tl.constexpr(SUMS.index("log_ratio_squared"))
SUM_ENTROPY = tl.constexpr(SUMS.index("entropy"))
SUM_REFERENCE_KL = tl.constexpr(SUMS.index("reference_kl"))
SUM_CLIPPED_HIGH = tl.constexpr(SUMS.index("clipped_high"))
SUM_CLIPPED_LOW = tl.constexpr(SUMS.index("clipped_low"))
SUM_DUAL_CLIPPED = tl.constexpr(SUMS.index("dual_clipped"))
SUM_INFLUENCE = tl.constexpr(SUMS.index("influence"))
SUM_INFLUENCE_AT_LOW = tl.constexpr(SUMS.index("influence_at_low"))
SUM_INFLUENCE_AT_HIGH = tl.constexpr(SUMS.index("influence_at_high"))
SUM_INFLUENCE_RAW = tl.constexpr(SUMS.index("influence_raw"))
SUM_COMPARED_TOKENS = tl.constexpr(SUMS.index("compared_tokens"))
SUM_ROLLOUT_DIFFERENCE = tl.constexpr(SUMS.index("rollout_difference"))
SUM_ROLLOUT_DIFFERENCE_SIZE = tl.constexpr(SUMS.index("rollout_difference_size"))
SUM_ROLLOUT_K3 = tl.constexpr(SUMS.index("rollout_k3"))
SUM_IMPORTANCE = tl.constexpr(SUMS.index("importance"))
SUM_IMPORTANCE_SQUARED = tl.constexpr(SUMS.index("importance_squared"))
SUM_IMPORTANCE_CAPPED = tl.constexpr(SUMS.index("importance_capped"))
MAX_INFLUENCE_MAX = tl.constexpr(MAXIMA.index("influence_max"))
MAX_INFLUENCE_NEGATIVE_MIN = tl.constexpr(MAXIMA.index("influence_negative_min"))
MAX_ROLLOUT_DIFFERENCE_MAX = tl.constexpr(MAXIMA.index("rollout_difference_max"))


def loss_constants(objective: ObjectiveConfig) -> dict[str, Any]:
    """The settings that `loss_rows_kernel` is compiled for."""
    return {
        "LOW": objective.ratio_bounds[0],
        "HIGH": objective.ratio_bounds[1],
        "WEIGHTED": objective.weights_tokens,
        "INFLUENCE_LOW": float(objective.influence_bounds[0]),
        "INFLUENCE_HIGH": float(objective.influence_bounds[1]),
        "SAFETY": objective.safety_threshold,
        "SAFE_LOW": SAFE_INFLUENCE[0],
        "SAFE_HIGH": SAFE_INFLUENCE[1],
        "CORRECTION": objective.correction,
        "CAP": objective.correction_cap,
        "KL": objective.kl_coefficient,
        "ENTROPY": objective.entropy_coefficient,
        "UNIT": objective.unit,
        "DROPS": objective.drops,
    }


@triton.jit
def _clamp(value, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The bounds as constants of the value's own dtype: tl.minimum would round a plain number to float32."""
    least = tl.full([1], LEAST, value.dtype)
    return tl.minimum(tl.maximum(value, least), tl.full([1], MOST, value.dtype))


@triton.jit
def _is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _usable_rows(
    row,
    valid,
    log_probs,
    old_log_probs,
    advantages,
    mask,
    entropy,
    reference,
    rollout,
    CORRECTS: tl.constexpr,
):
    """(bool: counts; bool: counts and finite; log π_θ − log π_old clamped, 0 if unusable; bool: not clamped; advantage)."""
    counts = valid
    if mask is not None:
        counts = valid & (tl.load(mask + row, mask=valid, other=0) != 0)
    log_prob = tl.load(log_probs + row, mask=valid, other=0.0)
    old = tl.load(old_log_probs + row, mask=valid, other=0.0)
    advantage = tl.load(advantages + row, mask=valid, other=0.0)
    finite = _is_finite(log_prob) & _is_finite(old) & _is_finite(advantage)
    if entropy is not None:
        finite = finite & _is_finite(tl.load(entropy + row, mask=valid, other=0.0))
    if reference is not None:
        finite = finite & _is_finite(tl.load(reference + row, mask=valid, other=0.0))
    if CORRECTS:
        finite = finite & _is_finite(tl.load(rollout + row, mask=valid, other=0.0))
    usable = counts & finite
    difference = tl.where(usable, log_prob - old, 0.0)
    log_ratio = _clamp(difference, -LIMIT, LIMIT)
    return counts, usable, log_ratio, log_ratio == difference, tl.where(usable, advantage, 0.0)


@triton.jit
def _exp(value):
    """e^value in its dtype, computed in float64: Triton's float32 exponential is off by several units in the last place."""
    return tl.exp(value.to(tl.float64)).to(value.dtype)


@triton.jit(do_not_specialize_on_alignment=["entropy"])
def loss_blocks_kernel(
    log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, slot_row, aggregate, counts,
    GAMMA: tl.constexpr, DUAL_CLIP: tl.constexpr, FUTURE_KL_LIMIT: tl.constexpr, CORRECTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per-row inputs [R] → aggregate [blocks] and counts [blocks, 2]: rows that are not finite, and dual-clipped ones."""
    block = tl.program_id(0)
    row, valid = block_rows(slot_row, BLOCK)
    present, usable, log_ratio, _, advantage = _usable_rows(
        row, valid, log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, CORRECTS
    )
    x = tl.where(log_ratio <= FUTURE_KL_LIMIT, log_ratio, 0.0).to(tl.float64)
    _, future = suffix_scan(x, GAMMA, BLOCK)
    tl.store(aggregate + block, first_slot(future, BLOCK))
    dual_clipped = (advantage < 0) & (_exp(log_ratio) > DUAL_CLIP)
    tl.store(counts + block * 2, tl.sum((present & ~usable).to(tl.float64), 0))
    tl.store(counts + block * 2 + 1, tl.sum(dual_clipped.to(tl.float64), 0))


@triton.jit
def _add(sums, index: tl.constexpr, counted, value):
    """Store the sum of the counted values in row `index` of this block's sums."""
    num_blocks = tl.num_programs(0)
    tl.store(
        sums + index * num_blocks + tl.program_id(0), tl.sum(tl.where(counted, value, 0.0).to(tl.float64), 0)
    )


@triton.jit
def _count(sums, index: tl.constexpr, counted):
    """The same with 1 for each value; integers are cheaper to sum."""
    num_blocks = tl.num_programs(0)
    tl.store(sums + index * num_blocks + tl.program_id(0), tl.sum(counted.to(tl.int32), 0).to(tl.float64))


@triton.jit
def _peak(maxima, index: tl.constexpr, counted, value):
    num_blocks = tl.num_programs(0)
    tl.store(
        maxima + index * num_blocks + tl.program_id(0),
        tl.max(tl.where(counted, value.to(tl.float64), LOWEST), 0),
    )


@triton.jit
def _k3(log_ratio):
    """(k3 = e^u − u − 1 with u clamped to ±20, its derivative)."""
    clamped = _clamp(log_ratio, -LIMIT, LIMIT)
    exponential = _exp(clamped)
    return exponential - clamped - 1, tl.where(clamped == log_ratio, exponential - 1, 0.0)


@triton.jit
def _surrogate(ratio, weighted, negative, LOW: tl.constexpr, HIGH: tl.constexpr, DUAL_CLIP: tl.constexpr):
    """(PPO's clipped surrogate with the dual clip, its derivative by the ratio), at the weighted advantage."""
    unclipped = -weighted * ratio
    clipped = -weighted * _clamp(ratio, LOW, HIGH)
    loss = tl.maximum(unclipped, clipped)
    slope = tl.where((unclipped > clipped) | ((ratio >= LOW) & (ratio <= HIGH)), -weighted, 0.0)
    bound = -weighted * DUAL_CLIP
    # Where loss and bound are equal, torch.minimum halves the gradient.
    bounded = tl.where(loss < bound, slope, tl.where(loss == bound, slope * 0.5, 0.0))
    return tl.where(negative, tl.minimum(loss, bound), loss), tl.where(negative, bounded, slope)


@triton.jit
def _reported(
    gathered, sequence, exists, num_sequences, CP: tl.constexpr, WIDTH: tl.constexpr, COLUMN: tl.constexpr
):
    """A column of `gathered` [cp, S, WIDTH] for these sequences, summed over the ranks."""
    total = tl.zeros(sequence.shape, tl.float64)
    for rank in tl.static_range(CP):
        index = (rank * num_sequences + sequence) * WIDTH + COLUMN
        total += tl.load(gathered + index, mask=exists, other=0.0)
    return total


@triton.jit
def drop_rule(
    gathered, response_length, sequence, num_sequences,
    CP: tl.constexpr, C: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Step 7 as `objective.drop_rule.apply_drop_rule`: (not finite, kept), each bool [1], of one sequence, and the reference weight.

    Every program reads the counts of all sequences: a few hundred numbers, which takes less time than another launch.
    """
    lane = tl.arange(0, LANES)
    sequences = tl.zeros([LANES], tl.float64)
    tokens = tl.zeros([LANES], tl.float64)
    first = tl.zeros([], tl.int32)
    while first < num_sequences:
        exists = first + lane < num_sequences
        non_finite = _reported(gathered, first + lane, exists, num_sequences, CP, C + 2, C) > 0
        keeps = non_finite == 0
        if DROPS:
            keeps = keeps & (_reported(gathered, first + lane, exists, num_sequences, CP, C + 2, C + 1) <= 1)
        length = tl.load(response_length + first + lane, mask=exists, other=0.0).to(tl.float64)
        sequences += (length > 0).to(tl.float64)
        tokens += tl.where(keeps, length, 0.0)
        first += LANES
    one = sequence + tl.arange(0, 1)
    non_finite_here = _reported(gathered, one, one >= 0, num_sequences, CP, C + 2, C) > 0
    kept_here = non_finite_here == 0
    if DROPS:
        kept_here = kept_here & (_reported(gathered, one, one >= 0, num_sequences, CP, C + 2, C + 1) <= 1)
    return non_finite_here, kept_here, tl.sum(sequences, 0) / tl.maximum(tl.sum(tokens, 0), 1.0)


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["entropy"])
def loss_rows_kernel(
    log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, last_row,
    slot_row, block_segment, aggregate, first_block, gathered, chunk_distance, is_later, row_distance, num_sequences,
    response_length,
    grad_log_probs, grad_entropy, influence, future_kl, kept_rows, sums, maxima,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
    FUTURE_KL_LIMIT: tl.constexpr, DUAL_CLIP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WEIGHTED: tl.constexpr, INFLUENCE_LOW: tl.constexpr, INFLUENCE_HIGH: tl.constexpr,
    SAFETY: tl.constexpr, SAFE_LOW: tl.constexpr, SAFE_HIGH: tl.constexpr,
    CORRECTION: tl.constexpr, CAP: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, UNIT: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """F, then steps 4 to 8 of the loss with their gradient, for the rows of one block.

    Per-row inputs [R] (mask, entropy, reference, rollout may be None), per-sequence ones [S] → per row: gradient of the
    loss sum by log-prob and (with an entropy bonus) by entropy, influence weight, F, and 1 if kept; per block: `sums`
    [len(SUMS), blocks] and `maxima` [len(MAXIMA), blocks], float64.
    """
    dtype: tl.constexpr = log_probs.dtype.element_ty
    segment = tl.load(block_segment + tl.program_id(0))
    sequence = segment // C
    non_finite_here, kept_here, reference_weight = drop_rule(
        gathered, response_length, sequence, num_sequences, CP, C, DROPS
    )
    row, valid = block_rows(slot_row, BLOCK)
    counts, usable, log_ratio, unclamped, advantage = _usable_rows(
        row,
        valid,
        log_probs,
        old_log_probs,
        advantages,
        mask,
        entropy,
        reference,
        rollout,
        CORRECTION != "none",
    )
    x = tl.where(log_ratio <= FUTURE_KL_LIMIT, log_ratio, 0.0).to(tl.float64)
    future = future_kl_of_rows(
        x, row, valid, aggregate, first_block, gathered, chunk_distance, is_later, row_distance, segment, num_sequences,
        GAMMA, RATE, CP, C, C + 2, SOURCES, BLOCK, TILE,
    ).to(dtype)  # fmt: skip
    tl.store(future_kl + row, future, mask=valid)

    kept = counts & kept_here
    finite = counts & (non_finite_here == 0)
    tl.store(kept_rows + row, kept.to(dtype), mask=valid)

    ratio = _exp(log_ratio)
    negative = advantage < 0
    weight = tl.full([BLOCK], 1.0, dtype)
    if WEIGHTED:
        weight = _clamp(_exp(future), INFLUENCE_LOW, INFLUENCE_HIGH)
        weight = tl.where(negative & (ratio > SAFETY), _clamp(weight, SAFE_LOW, SAFE_HIGH), weight)
    tl.store(influence + row, weight, mask=valid)
    policy, slope = _surrogate(ratio, advantage * weight, negative, LOW, HIGH, DUAL_CLIP)

    difference = tl.zeros([BLOCK], dtype)
    known = tl.zeros([BLOCK], tl.int1)
    if rollout is not None:
        sampled = tl.load(rollout + row, mask=valid, other=0.0)
        known = usable & _is_finite(sampled)
        difference = tl.where(known, tl.load(old_log_probs + row, mask=valid, other=0.0) - sampled, 0.0)
    clamped = _clamp(difference, -LIMIT, LIMIT)
    importance = _exp(clamped)
    if CORRECTION == "tis":
        factor = _clamp(importance, 0.0, CAP)
        policy, slope = policy * factor, slope * factor
    if CORRECTION == "mis":
        factor = tl.where(importance <= CAP, importance, 0.0)
        policy, slope = policy * factor, slope * factor

    loss = policy
    gradient = tl.where(unclamped, slope * ratio, 0.0)
    reference_kl = tl.zeros([BLOCK], dtype)
    if reference is not None:
        log_prob = tl.load(log_probs + row, mask=valid, other=0.0)
        reference_ratio = tl.load(reference + row, mask=valid, other=0.0) - log_prob
        reference_kl, reference_slope = _k3(tl.where(usable, reference_ratio, 0.0))
        loss += KL * reference_kl
        gradient -= KL * reference_slope
    entropies = tl.zeros([BLOCK], dtype)
    if entropy is not None:
        entropies = tl.where(usable, tl.load(entropy + row, mask=valid, other=0.0), 0.0)
        loss -= ENTROPY * entropies
    sequence_weight = tl.full([BLOCK], 1.0, dtype)
    if UNIT == "kept_sequences":
        sequence_weight /= tl.maximum(tl.load(response_length + sequence), 1.0).to(dtype)
    if UNIT == "sequences":
        sequence_weight = tl.full([BLOCK], 0.0, dtype) + reference_weight.to(dtype)
    row_weight = tl.where(kept, sequence_weight, 0.0)
    tl.store(grad_log_probs + row, tl.where(usable, row_weight * gradient, 0.0), mask=valid)
    if grad_entropy is not None:
        tl.store(grad_entropy + row, tl.where(usable, -ENTROPY * row_weight, 0.0), mask=valid)

    last = tl.load(last_row + row, mask=valid, other=0.0)
    unit = kept.to(dtype)
    if UNIT == "kept_sequences":
        unit *= last
    if UNIT == "sequences":
        unit = last
    raw = _exp(_clamp(future, LOWEST, LIMIT))
    _add(sums, SUM_LOSS, valid, row_weight * loss)
    _add(sums, SUM_NORMALIZER, valid, unit)
    _add(sums, SUM_TOKEN_MEAN_LOSS, kept, policy)
    _add(sums, SUM_REFERENCE_LOSS, kept, policy.to(tl.float64) * reference_weight)
    _add(sums, SUM_SEQUENCES, valid, last)
    _add(sums, SUM_DROPPED_SEQUENCES, valid & (kept_here == 0) & (non_finite_here == 0), last)
    _add(sums, SUM_NONFINITE_SEQUENCES, valid & non_finite_here, last)
    _count(sums, SUM_TOKENS, counts)
    _count(sums, SUM_FINITE_TOKENS, finite)
    _count(sums, SUM_KEPT_TOKENS, kept)
    _add(sums, SUM_LOG_RATIO, finite, log_ratio)
    _add(sums, SUM_LOG_RATIO_SQUARED, finite, log_ratio * log_ratio)
    _add(sums, SUM_ENTROPY, finite, entropies)
    _add(sums, SUM_REFERENCE_KL, finite, reference_kl)
    _count(sums, SUM_CLIPPED_HIGH, finite & (advantage > 0) & (ratio > HIGH))
    _count(sums, SUM_CLIPPED_LOW, finite & negative & (ratio < LOW))
    _count(sums, SUM_DUAL_CLIPPED, finite & negative & (ratio > DUAL_CLIP))
    _add(sums, SUM_INFLUENCE, finite, weight)
    _count(sums, SUM_INFLUENCE_AT_LOW, finite & (raw <= INFLUENCE_LOW))
    _count(sums, SUM_INFLUENCE_AT_HIGH, finite & (raw >= INFLUENCE_HIGH))
    _add(sums, SUM_INFLUENCE_RAW, finite, raw)

    compared = finite & known
    exact = clamped.to(tl.float64)
    growth = tl.exp(exact)
    _count(sums, SUM_COMPARED_TOKENS, compared)
    _add(sums, SUM_ROLLOUT_DIFFERENCE, compared, difference)
    _add(sums, SUM_ROLLOUT_DIFFERENCE_SIZE, compared, tl.abs(difference))
    _add(sums, SUM_ROLLOUT_K3, compared, growth - exact - 1)
    _add(sums, SUM_IMPORTANCE, compared, growth)
    _add(sums, SUM_IMPORTANCE_SQUARED, compared, growth * growth)
    _count(sums, SUM_IMPORTANCE_CAPPED, compared & (importance > CAP))
    _peak(maxima, MAX_INFLUENCE_MAX, finite, weight)
    _peak(maxima, MAX_INFLUENCE_NEGATIVE_MIN, finite, -weight)
    _peak(maxima, MAX_ROLLOUT_DIFFERENCE_MAX, compared, tl.abs(difference))
