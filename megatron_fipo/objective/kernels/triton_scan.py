"""FutureKL as Triton kernels: two launches around the all-gather, one more if there is something to gather.

    before the gather   scan_blocks_kernel   one program per block of 128 slots: what the block adds to everything before it
                        chunk_sums_kernel    one program per sequence: what each of its chunks adds (sent to all ranks)
    after the gather    scan_rows_kernel     one program per block: F of each row

A program of the last kernel sums the aggregates of the later blocks of its chunk, weighted by distance: at most a few
hundred numbers, which takes less time than another launch that would prepare the sum.

Slots of a block are read from right to left, so that a suffix scan is a prefix scan: element i of a vector is slot
127 − i. The scan composes pairs (decay, F): decay is the factor of the part on everything later. Rows are found through
the plan's `slot_row`; slots without a row hold zeros. There are no atomics, so results are bitwise deterministic.

Decay, scan and sums are float64. A GPU with slow float64 is not limited by it: there are a few hundred operations per
token, where the model has billions.

Notation: R rows, S sequences, C chunks per sequence and rank, cp ranks, WIDTH numbers per sequence in the gather. Tables
as in `ScanPlan`.
"""

import triton
import triton.language as tl


@triton.jit
def compose(later_decay, later_future, decay, future):
    """The pair rule. The later part is the first operand, because slots are read from right to left."""
    return later_decay * decay, future + decay * later_future


@triton.jit
def suffix_scan(value, GAMMA: tl.constexpr, SIZE: tl.constexpr):
    """(γ^n, F if nothing comes later) of each of SIZE float64 values, n counted from the right end."""
    decay = tl.full([SIZE], GAMMA, tl.float64)
    return tl.associative_scan((decay, value), 0, compose)


@triton.jit
def power(distance, RATE: tl.constexpr):
    """γ^distance for float64 distances."""
    return tl.exp2(distance * -RATE)


@triton.jit
def block_rows(slot_row, BLOCK: tl.constexpr):
    """(row of each slot of this program's block from right to left, bool: the slot has a row)."""
    row = tl.load(slot_row + tl.program_id(0) * BLOCK + (BLOCK - 1 - tl.arange(0, BLOCK)))
    return tl.maximum(row, 0), row >= 0


@triton.jit
def first_slot(value, BLOCK: tl.constexpr):
    """The value in the block's first slot, which is the last lane."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, value, 0.0), 0)


@triton.jit
def add_blocks(aggregate, first, end, before, RATE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """F at `before` positions before block `first`, from the blocks up to `end`, TILE at a time. float64."""
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    offset = tl.zeros([], tl.int32)
    while first + offset < end:
        index = offset + lane
        value = tl.load(aggregate + first + index, mask=first + index < end, other=0.0)
        total += value * power(before + index.to(tl.float64) * BLOCK, RATE)
        offset += TILE
    return tl.sum(total, 0)


@triton.jit
def future_kl_of_rows(
    x, row, valid, aggregate, first_block, gathered, chunk_distance, is_later, row_distance, segment, num_sequences,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """F of this block's rows: from the block, later blocks of its chunk, and later chunks on every rank. float64."""
    decay, future = suffix_scan(x, GAMMA, BLOCK)
    end = tl.load(first_block + segment + 1)
    future += decay * add_blocks(aggregate, tl.program_id(0) + 1, end, 0.0, RATE, BLOCK, TILE)
    if CP * C > 1:  # else no chunk is later
        sequence = segment // C
        source = tl.arange(0, SOURCES)
        exists = source < CP * C
        index = (source // C) * num_sequences + sequence  # [rank, sequence]
        aggregate = tl.load(gathered + index * WIDTH + source % C, mask=exists, other=0.0)
        pair = (index * C + source % C) * C + segment % C
        weight = power(tl.load(chunk_distance + pair, mask=exists, other=0.0), RATE)
        later_chunks = tl.sum(aggregate * weight * tl.load(is_later + pair, mask=exists, other=0.0), 0)
        future += power(tl.load(row_distance + row, mask=valid, other=0.0), RATE) * later_chunks
    return future


@triton.jit
def scan_blocks_kernel(x, slot_row, aggregate, GAMMA: tl.constexpr, BLOCK: tl.constexpr):
    """x [R] → aggregate [blocks]: F in each block's first slot if nothing comes after the block."""
    row, valid = block_rows(slot_row, BLOCK)
    value = tl.load(x + row, mask=valid, other=0.0).to(tl.float64)
    _, future = suffix_scan(value, GAMMA, BLOCK)
    tl.store(aggregate + tl.program_id(0), first_slot(future, BLOCK))


@triton.jit(do_not_specialize=["num_sequences"])
def scan_rows_kernel(
    x, slot_row, block_segment, aggregate, first_block, gathered, chunk_distance, is_later, row_distance, num_sequences, out,
    GAMMA: tl.constexpr, RATE: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x [R], aggregate [blocks], gathered [cp, S, WIDTH] (unused if cp·C is 1) → out [R]: FutureKL."""
    row, valid = block_rows(slot_row, BLOCK)
    value = tl.load(x + row, mask=valid, other=0.0).to(tl.float64)
    segment = tl.load(block_segment + tl.program_id(0))
    future = future_kl_of_rows(
        value, row, valid, aggregate, first_block, gathered, chunk_distance, is_later, row_distance, segment, num_sequences,
        GAMMA, RATE, CP, C, WIDTH, SOURCES, BLOCK, TILE,
    )  # fmt: skip
    tl.store(out + row, future.to(out.dtype.element_ty), mask=valid)


@triton.jit
def chunk_sums_kernel(
    aggregate, counts, first_block, first_row_offset, local,
    RATE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """aggregate [blocks], counts [blocks, K] → local [S, WIDTH]: F at each chunk's start if nothing comes after the chunk,
    then the sums of the counts. One program per sequence.
    """
    sequence = tl.program_id(0)
    lane = tl.arange(0, TILE)
    out = local + sequence * WIDTH
    for c in tl.static_range(C):
        start = tl.load(first_block + sequence * C + c)
        end = tl.load(first_block + sequence * C + c + 1)
        before = tl.load(first_row_offset + sequence * C + c)
        tl.store(out + c, add_blocks(aggregate, start, end, before, RATE, BLOCK, TILE))
    start = tl.load(first_block + sequence * C)
    end = tl.load(first_block + sequence * C + C)
    for k in tl.static_range(K):
        total = tl.zeros([TILE], tl.float64)
        first = start
        while first < end:
            total += tl.load(counts + (first + lane) * K + k, mask=first + lane < end, other=0.0)
            first += TILE
        tl.store(out + C + k, tl.sum(total, 0))
