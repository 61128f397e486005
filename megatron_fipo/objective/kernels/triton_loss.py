"""FutureKL and the policy loss as Triton kernels: three launches around one all-gather, the same numbers as the torch path.

    before the gather   *_blocks_kernel      a program per block of 128 slots: what the block does to everything before it
                        chunk_sums_kernel    a program per sequence: what each of its chunks does (goes to all ranks)
    after the gather    *_rows_kernel        a program per block: F of each row, and for the loss all that follows from it

The middle one is left out of a scan that has nothing to gather. Each program of the last one weighs and adds what the blocks behind
its own do: at most a few hundred numbers, which takes less time than another launch that would hand it the sum.

A block's slots are read from right to left, so that a suffix scan is a prefix scan: element i of a vector is slot 127 − i. The
scan composes pairs (decay, F): decay is what the part multiplies everything behind it with. Rows are found through the plan's
`slot_row`; slots without a row hold zeros. No atomics, no order of arrival: the same input gives the same bits.

Decay, scan, sums and exponentials are float64; per-row values have the dtype of the log-probs, float32 beside a model. A GPU that
does float64 slowly does not notice: there are a few hundred operations per token, where the model has billions.

Letters: R rows, S sequences, C chunks per sequence and rank, cp ranks, WIDTH numbers per sequence in the gather. Tables as in
`ScanPlan`.
"""

import triton
import triton.language as tl

from megatron_fipo.objective.metrics import SUMS

TOKEN_SUMS = tuple(name for name in SUMS if name != "reference_loss")
"""What `loss_rows_kernel` adds up in each block, in the order of its rows of `sums`."""

LIMIT = tl.constexpr(20.0)
"""LOG_RATIO_LIMIT; the launcher checks that they agree."""
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _compose(decay_behind, future_behind, decay, future):
    """What lies behind comes first, because slots are read from right to left."""
    return decay_behind * decay, future + decay * future_behind


@triton.jit
def _suffix_scan(value, GAMMA: tl.constexpr, SIZE: tl.constexpr):
    """(γ^n, F with nothing behind) of each of SIZE float64 values, n counting from the right end."""
    decay = tl.full([SIZE], GAMMA, tl.float64)
    return tl.associative_scan((decay, value), 0, _compose)


@triton.jit
def _power(distance, RATE: tl.constexpr):
    """γ^distance for float64 distances."""
    return tl.exp2(distance * -RATE)


@triton.jit
def _block_rows(slot_row, BLOCK: tl.constexpr):
    """This program's rows from right to left, and where there is one."""
    row = tl.load(slot_row + tl.program_id(0) * BLOCK + (BLOCK - 1 - tl.arange(0, BLOCK)))
    return tl.maximum(row, 0), row >= 0


@triton.jit
def _first(value, BLOCK: tl.constexpr):
    """The value in the block's first slot, which is read last."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, value, 0.0), 0)


@triton.jit
def _add_blocks(aggregate, first, end, before, RATE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """F at `before` positions before block `first`, from the blocks up to `end`, TILE at a time. float64."""
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    offset = tl.zeros([], tl.int32)
    while first + offset < end:
        away = offset + lane
        value = tl.load(aggregate + first + away, mask=first + away < end, other=0.0)
        total += value * _power(before + away.to(tl.float64) * BLOCK, RATE)
        offset += TILE
    return tl.sum(total, 0)


@triton.jit
def _future_kl(
    x, row, held, aggregate, first_block, gathered, distance, follows, row_distance, segment, num_sequences,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """F of this block's rows: within the block, behind it in its chunk, and behind the chunk on every rank. float64."""
    decay, future = _suffix_scan(x, GAMMA, BLOCK)
    end = tl.load(first_block + segment + 1)
    future += decay * _add_blocks(aggregate, tl.program_id(0) + 1, end, 0.0, RATE, BLOCK, TILE)
    if CP * C > 1:  # else no chunk lies behind
        sequence = segment // C
        source = tl.arange(0, SOURCES)
        exists = source < CP * C
        place = (source // C) * num_sequences + sequence  # [rank, sequence]
        aggregate = tl.load(gathered + place * WIDTH + source % C, mask=exists, other=0.0)
        pair = (place * C + source % C) * C + segment % C
        weight = _power(tl.load(distance + pair, mask=exists, other=0.0), RATE)
        behind_chunk = tl.sum(aggregate * weight * tl.load(follows + pair, mask=exists, other=0.0), 0)
        future += _power(tl.load(row_distance + row, mask=held, other=0.0), RATE) * behind_chunk
    return future


@triton.jit
def scan_blocks_kernel(x, slot_row, aggregate, GAMMA: tl.constexpr, BLOCK: tl.constexpr):
    """x [R] → aggregate [blocks]: F in each block's first slot with nothing behind the block."""
    row, held = _block_rows(slot_row, BLOCK)
    value = tl.load(x + row, mask=held, other=0.0).to(tl.float64)
    _, future = _suffix_scan(value, GAMMA, BLOCK)
    tl.store(aggregate + tl.program_id(0), _first(future, BLOCK))


@triton.jit
def scan_rows_kernel(
    x, slot_row, block_segment, aggregate, first_block, gathered, distance, follows, row_distance, num_sequences, out,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x [R], aggregate [blocks], gathered [cp, S, WIDTH] (unused where cp·C is 1) → out [R]: FutureKL."""
    row, held = _block_rows(slot_row, BLOCK)
    value = tl.load(x + row, mask=held, other=0.0).to(tl.float64)
    segment = tl.load(block_segment + tl.program_id(0))
    future = _future_kl(
        value, row, held, aggregate, first_block, gathered, distance, follows, row_distance, segment, num_sequences,
        GAMMA, RATE, CP, C, WIDTH, SOURCES, BLOCK, TILE,
    )  # fmt: skip
    tl.store(out + row, future.to(out.dtype.element_ty), mask=held)


@triton.jit
def chunk_sums_kernel(
    aggregate, counts, first_block, lead, local,
    RATE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """aggregate [blocks], counts [blocks, K] → local [S, WIDTH]: F at each chunk's start with nothing behind the chunk, then the sums
    of the counts. One program per sequence.
    """
    sequence = tl.program_id(0)
    lane = tl.arange(0, TILE)
    out = local + sequence * WIDTH
    for c in tl.static_range(C):
        start = tl.load(first_block + sequence * C + c)
        end = tl.load(first_block + sequence * C + c + 1)
        before = tl.load(lead + sequence * C + c)
        tl.store(out + c, _add_blocks(aggregate, start, end, before, RATE, BLOCK, TILE))
    start = tl.load(first_block + sequence * C)
    end = tl.load(first_block + sequence * C + C)
    for k in tl.static_range(K):
        total = tl.zeros([TILE], tl.float64)
        first = start
        while first < end:
            total += tl.load(counts + (first + lane) * K + k, mask=first + lane < end, other=0.0)
            first += TILE
        tl.store(out + C + k, tl.sum(total, 0))


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
    row, held, log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, CORRECTS: tl.constexpr
):
    """(bool: counts; bool: counts and finite; log π_θ − log π_old clamped, 0 where unusable; whether the clamp left it alone; advantage)."""
    counts = held
    if mask is not None:
        counts = held & (tl.load(mask + row, mask=held, other=0) != 0)
    log_prob = tl.load(log_probs + row, mask=held, other=0.0)
    old = tl.load(old_log_probs + row, mask=held, other=0.0)
    advantage = tl.load(advantages + row, mask=held, other=0.0)
    finite = _is_finite(log_prob) & _is_finite(old) & _is_finite(advantage)
    if entropy is not None:
        finite = finite & _is_finite(tl.load(entropy + row, mask=held, other=0.0))
    if reference is not None:
        finite = finite & _is_finite(tl.load(reference + row, mask=held, other=0.0))
    if CORRECTS:
        finite = finite & _is_finite(tl.load(rollout + row, mask=held, other=0.0))
    usable = counts & finite
    difference = tl.where(usable, log_prob - old, 0.0)
    log_ratio = _clamp(difference, -LIMIT, LIMIT)
    return counts, usable, log_ratio, log_ratio == difference, tl.where(usable, advantage, 0.0)


@triton.jit
def _exp(value):
    """e^value in its dtype, by way of float64: Triton's own float32 exponential is off by several units in the last place."""
    return tl.exp(value.to(tl.float64)).to(value.dtype)


@triton.jit
def loss_blocks_kernel(
    log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, slot_row, aggregate, counts,
    GAMMA: tl.constexpr, DUAL_CLIP: tl.constexpr, LOG_DUAL_CLIP: tl.constexpr, CORRECTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per-row inputs [R] → aggregate [blocks] and counts [blocks, 2]: rows that are not finite, and dual-clipped ones."""
    block = tl.program_id(0)
    row, held = _block_rows(slot_row, BLOCK)
    present, usable, log_ratio, _, advantage = _usable_rows(
        row, held, log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, CORRECTS
    )
    x = tl.where(log_ratio <= LOG_DUAL_CLIP, log_ratio, 0.0).to(tl.float64)
    _, future = _suffix_scan(x, GAMMA, BLOCK)
    tl.store(aggregate + block, _first(future, BLOCK))
    dual_clipped = (advantage < 0) & (_exp(log_ratio) > DUAL_CLIP)
    tl.store(counts + block * 2, tl.sum((present & ~usable).to(tl.float64), 0))
    tl.store(counts + block * 2 + 1, tl.sum(dual_clipped.to(tl.float64), 0))


@triton.jit
def _add(sums, index: tl.constexpr, counted, value):
    """Put the sum of the counted values into row `index` of this block's sums."""
    num_blocks = tl.num_programs(0)
    tl.store(
        sums + index * num_blocks + tl.program_id(0), tl.sum(tl.where(counted, value, 0.0).to(tl.float64), 0)
    )


@triton.jit
def _count(sums, index: tl.constexpr, counted):
    """The same with 1 for a value; integers are cheaper to add up."""
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
def loss_rows_kernel(
    log_probs, old_log_probs, advantages, mask, entropy, reference, rollout, last_row,
    slot_row, block_segment, aggregate, first_block, gathered, distance, follows, row_distance, num_sequences,
    kept_sequence, non_finite_sequence, sequence_weight,
    grad_log_probs, grad_entropy, influence, future_kl, kept_rows, sums, maxima,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
    LOG_DUAL_CLIP: tl.constexpr, DUAL_CLIP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WEIGHED: tl.constexpr, INFLUENCE_LOW: tl.constexpr, INFLUENCE_HIGH: tl.constexpr,
    SAFETY: tl.constexpr, SAFE_LOW: tl.constexpr, SAFE_HIGH: tl.constexpr,
    CORRECTION: tl.constexpr, CAP: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Everything that follows from F, for the rows of one block.

    Per-row inputs [R] (mask, entropy, reference, rollout may be None), per-sequence ones [S] → per row: gradient of the loss sum by
    log-prob and (with an entropy bonus) by entropy, influence weight, F, and 1 where kept; per block: `sums` [len(TOKEN_SUMS),
    blocks] and `maxima` [3, blocks] in the order of `Statistics`, float64.
    """
    dtype: tl.constexpr = log_probs.dtype.element_ty
    row, held = _block_rows(slot_row, BLOCK)
    counts, usable, log_ratio, unclamped, advantage = _usable_rows(
        row,
        held,
        log_probs,
        old_log_probs,
        advantages,
        mask,
        entropy,
        reference,
        rollout,
        CORRECTION != "none",
    )
    segment = tl.load(block_segment + tl.program_id(0))
    x = tl.where(log_ratio <= LOG_DUAL_CLIP, log_ratio, 0.0).to(tl.float64)
    future = _future_kl(
        x, row, held, aggregate, first_block, gathered, distance, follows, row_distance, segment, num_sequences,
        GAMMA, RATE, CP, C, C + 2, SOURCES, BLOCK, TILE,
    ).to(dtype)  # fmt: skip
    tl.store(future_kl + row, future, mask=held)

    kept_here = tl.load(kept_sequence + segment // C) != 0
    non_finite_here = tl.load(non_finite_sequence + segment // C) != 0
    kept = counts & kept_here
    finite = counts & (non_finite_here == 0)
    tl.store(kept_rows + row, kept.to(dtype), mask=held)

    ratio = _exp(log_ratio)
    negative = advantage < 0
    weight = tl.full([BLOCK], 1.0, dtype)
    if WEIGHED:
        weight = _clamp(_exp(future), INFLUENCE_LOW, INFLUENCE_HIGH)
        weight = tl.where(negative & (ratio > SAFETY), _clamp(weight, SAFE_LOW, SAFE_HIGH), weight)
    tl.store(influence + row, weight, mask=held)
    policy, slope = _surrogate(ratio, advantage * weight, negative, LOW, HIGH, DUAL_CLIP)

    difference = tl.zeros([BLOCK], dtype)
    known = tl.zeros([BLOCK], tl.int1)
    if rollout is not None:
        sampled = tl.load(rollout + row, mask=held, other=0.0)
        known = usable & _is_finite(sampled)
        difference = tl.where(known, tl.load(old_log_probs + row, mask=held, other=0.0) - sampled, 0.0)
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
        behind = tl.load(reference + row, mask=held, other=0.0) - tl.load(
            log_probs + row, mask=held, other=0.0
        )
        reference_kl, reference_slope = _k3(tl.where(usable, behind, 0.0))
        loss += KL * reference_kl
        gradient -= KL * reference_slope
    entropies = tl.zeros([BLOCK], dtype)
    if entropy is not None:
        entropies = tl.where(usable, tl.load(entropy + row, mask=held, other=0.0), 0.0)
        loss -= ENTROPY * entropies
    row_weight = tl.where(kept, tl.load(sequence_weight + segment // C), 0.0)
    tl.store(grad_log_probs + row, tl.where(usable, row_weight * gradient, 0.0), mask=held)
    if grad_entropy is not None:
        tl.store(grad_entropy + row, tl.where(usable, -ENTROPY * row_weight, 0.0), mask=held)

    last = tl.load(last_row + row, mask=held, other=0.0)
    unit = kept.to(dtype)
    if UNIT == "kept_sequences":
        unit *= last
    if UNIT == "sequences":
        unit = last
    raw = _exp(_clamp(future, LOWEST, LIMIT))
    _add(sums, 0, held, row_weight * loss)
    _add(sums, 1, held, unit)
    _add(sums, 2, kept, policy)
    _add(sums, 3, held, last)
    _add(sums, 4, held & (kept_here == 0) & (non_finite_here == 0), last)
    _add(sums, 5, held & non_finite_here, last)
    _count(sums, 6, counts)
    _count(sums, 7, finite)
    _count(sums, 8, kept)
    _add(sums, 9, finite, log_ratio)
    _add(sums, 10, finite, log_ratio * log_ratio)
    _add(sums, 11, finite, entropies)
    _add(sums, 12, finite, reference_kl)
    _count(sums, 13, finite & (advantage > 0) & (ratio > HIGH))
    _count(sums, 14, finite & negative & (ratio < LOW))
    _count(sums, 15, finite & negative & (ratio > DUAL_CLIP))
    _add(sums, 16, finite, weight)
    _count(sums, 17, finite & (raw <= INFLUENCE_LOW))
    _count(sums, 18, finite & (raw >= INFLUENCE_HIGH))
    _add(sums, 19, finite, raw)

    compared = finite & known
    exact = clamped.to(tl.float64)
    growth = tl.exp(exact)
    _count(sums, 20, compared)
    _add(sums, 21, compared, difference)
    _add(sums, 22, compared, tl.abs(difference))
    _add(sums, 23, compared, growth - exact - 1)
    _add(sums, 24, compared, growth)
    _add(sums, 25, compared, growth * growth)
    _count(sums, 26, compared & (importance > CAP))
    _peak(maxima, 0, finite, weight)
    _peak(maxima, 1, finite, -weight)
    _peak(maxima, 2, compared, tl.abs(difference))
