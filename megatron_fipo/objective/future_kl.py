"""FutureKL on packed, context-parallel shards: linear in length, one small collective, no host synchronization.

Definition (the paper's FutureKL), with x_k = 0 for positions that do not count:

    F_t = Σ_{k≥t} γ^(k−t)·x_k = x_t + γ·F_{t+1},    γ = 2^(−1/half_life)

Pair rule. A run of n positions acts on everything before it through one pair (n, G): its aggregate G is F at its first
position if nothing comes after it. Pairs compose associatively:

    (n₁, G₁) ∘ (n₂, G₂) = (n₁ + n₂, G₁ + γ^n₁·G₂)

so a sequence may be cut anywhere and its pieces may be on any rank. The rule is applied at three sizes: blocks of 128
positions (a product with a triangular matrix), blocks of blocks (the same product one level up, until one block is left),
and the chunks of the context-parallel ranks (an all-gather of their G).

Worked example: 2 sequences of 8 and 4 positions, all of them rows with x = 1; half life 1, so γ = ½; cp = 2, zigzag:

    sequence 0, chunks of 2   rank 0: positions 0 1 | 6 7     rank 1: positions 2 3 | 4 5
    sequence 1, chunks of 1   rank 0: position  0   | 3       rank 1: position  1   | 2

  1. Each chunk alone. Sequence 0: F = (1.5, 1) in every chunk, so G = 1.5. Sequence 1: G = 1.
     (If a chunk starts with positions without a row, G is that of its first row times γ^first_row_offset.)
  2. All-gather: every rank has G of all 8 chunks.
  3. Carry of a chunk = F at the position after its end = Σ over later chunks of γ^(their start − its end)·G.
     Sequence 0, rank 1, chunk 2 3 (ends at 4): chunk 4 5 starts at 4, chunk 6 7 at 6: γ^0·1.5 + γ^2·1.5 = 1.875.
     Sequence 1, rank 0, chunk 0 (ends at 1): γ^0·1 + γ^1·1 + γ^2·1 = 1.75.
  4. Each row adds γ^(chunk end − its position)·carry. Sequence 0, position 3: 1 + ½·1.875 = 1.9375.
     Sequence 1, position 0: 1 + ½·1.75 = 1.875.

Powers of γ are formed at distances ≥ 0 only: they underflow to 0 harmlessly, where γ^(−t) would overflow. The arithmetic
inside is float64. Its cost is negligible beside a model, F is then the same to float32 rounding for every cut, and a
training script that allows TF32 matrix products cannot affect it.

Notation: R rows (response tokens on this rank), S sequences, C chunks per sequence and rank, cp ranks, k extra sums.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.objective.kernels.choice import takes_triton
from megatron_fipo.objective.scan_layout import (
    BLOCK,
    LARGEST_RATE,
    Level,
    ScanPlan,
    all_gather,
    check_group,
    decay_rate,
)

DTYPES = (torch.float32, torch.float64)


@torch.no_grad()
def scan_future_kl(
    x: Tensor,
    extra_sums: Tensor,
    plan: ScanPlan,
    half_life: float,
    group: dist.ProcessGroup | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """FutureKL of every row, and sums of extra columns over each complete sequence. No gradient flows through either.

    x: [R], what each row adds to F (float32 or float64; finite). extra_sums: [R, k], numbers to be summed per sequence
    over all context-parallel ranks in the same collective. half_life: tokens after which x counts half; `math.inf` for no
    decay. Returns F [R] in the dtype of x, and totals [S, k] float64, the same on every rank.

    Collectives: one all-gather over `group` of [S, C + k] float64 per rank, with zigzag and two extra sums 32 bytes per
    sequence and rank at any length. `group=None` means that this rank holds the sequences completely: same code, no
    collective. Every rank of the group must call, also those without rows. kernels: `auto` (Triton on a GPU), `triton`,
    `torch`. Raises ValueError for shapes, dtypes or a group size that do not fit the plan.
    """
    rate = decay_rate(half_life)
    _check_scan(x, extra_sums, plan)
    check_group(plan, group)
    if takes_triton(kernels, x, DTYPES):
        # Imported here: the module imports Triton, which may be absent.
        from megatron_fipo.objective.kernels.launch import triton_scan

        return triton_scan(x, extra_sums, plan, rate, group)
    return torch_scan(x, extra_sums, plan, rate, group)


def torch_scan(
    x: Tensor, extra_sums: Tensor, plan: ScanPlan, rate: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """`scan_future_kl` in plain torch, for inputs that it has checked; `rate` is −log2 γ."""
    x64 = x.double()
    carry, aggregate = _scan_segments(x64, plan.levels, rate)  # within each chunk
    at_chunk_start = aggregate.view_as(plan.first_row_offset) * _power(plan.first_row_offset, rate)
    sums = extra_sums.new_zeros(plan.num_sequences, extra_sums.shape[1], dtype=torch.float64)
    sums.index_add_(0, plan.row_sequence, extra_sums.double())

    gathered = all_gather(torch.cat([at_chunk_start, sums], dim=1), group)  # [cp, S, C + k]
    aggregates, totals = gathered.split([plan.chunks_per_rank, extra_sums.shape[1]], dim=2)
    weights = _power(plan.chunk_distance, rate) * plan.is_later
    # F at the first position after each chunk.
    later_chunks = torch.einsum("rsq,rsqc->sc", aggregates, weights)

    future_kl = (
        x64 + 2.0**-rate * carry + _power(plan.row_distance, rate) * later_chunks.view(-1)[plan.row_segment]
    )
    return future_kl.to(x.dtype), totals.sum(dim=0)


def _scan_segments(x: Tensor, levels: tuple[Level, ...], rate: float) -> tuple[Tensor, Tensor]:
    """carry [elements]: F at the next element of the same segment; aggregate [segments]: F at a segment's first element.

    An element of this level decays by 2^(−rate). Elements are in a [blocks, 128] grid; the carry of a block comes from
    the level above, where blocks are the elements.
    """
    level, above = levels[0], levels[1:]
    grid = x.new_zeros(level.blocks * BLOCK).index_copy_(0, level.slot, x).view(level.blocks, BLOCK)
    index = torch.arange(BLOCK, device=x.device, dtype=x.dtype)
    gap = (index[:, None] - index - 1).clamp(min=0)
    carry = grid @ _power(gap, rate).tril(-1)  # carry[:, k] = Σ_{j>k} γ^(j−k−1)·grid[:, j]
    aggregate = grid @ _power(index, rate)
    if above:
        block_carry, aggregate = _scan_segments(aggregate, above, min(rate * BLOCK, LARGEST_RATE))
        carry = carry + block_carry[:, None] * _power(BLOCK - 1 - index, rate)
    return carry.view(-1)[level.slot], aggregate


def _power(distance: Tensor, rate: float) -> Tensor:
    """γ^distance for distances ≥ 0; 1 at distance 0 for every γ, 0 included."""
    return torch.exp2(distance * -rate)


def _check_scan(x: Tensor, extra_sums: Tensor, plan: ScanPlan) -> None:
    if x.shape != (plan.num_rows,) or extra_sums.ndim != 2 or extra_sums.shape[0] != plan.num_rows:
        raise ValueError(
            f"x {list(x.shape)} and extra_sums {list(extra_sums.shape)} do not fit a plan of {plan.num_rows} rows"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32 or float64, not {x.dtype}")
