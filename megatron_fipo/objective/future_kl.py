"""FutureKL on packed, context-parallel shards: linear in length, one tiny collective, no host synchronisation.

    F_t = x_t + γ·F_{t+1} = Σ_{k≥t} γ^(k−t)·x_k,    γ = 2^(−1/half_life)                      (the paper's FutureKL)

What a run of n positions does to everything before it is one pair (n, A), where A is F at its first position with nothing
behind it. Pairs compose associatively:

    (n₁, A₁) ∘ (n₂, A₂) = (n₁ + n₂, A₁ + γ^n₁·A₂)

so a sequence may be cut anywhere and its pieces may lie on any rank. One rule serves three sizes of piece: blocks of 128
positions (a triangular product), blocks of blocks (the same product one level up, until one block is left), and the chunks
that context-parallel ranks hold (an all-gather of their A). Powers of γ are only formed at distances ≥ 0: they underflow
to 0 harmlessly, where γ^(−t) would overflow.

The arithmetic inside is float64. Beside a model it costs nothing, F then comes out the same to float32 rounding however
sequences are cut, and a training script that allows TF32 matrix products cannot touch it.

Letters: R rows (response tokens on this rank), S sequences, C chunks per sequence and rank, cp ranks, k riders.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.objective.kernels.choice import takes_triton
from megatron_fipo.objective.scan_layout import BLOCK, Level, ScanPlan

LARGEST_RATE = 2000.0
"""2^−2000 is 0 in float64, so a half life below 1/2000 is γ = 0 exactly; the bound keeps 0·rate from becoming 0·∞."""


@torch.no_grad()
def scan_future_kl(
    x: Tensor,
    riders: Tensor,
    plan: ScanPlan,
    half_life: float,
    group: dist.ProcessGroup | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """FutureKL of every row, and sums of the riders over each whole sequence. No gradient flows through either.

    x: [R], what each row adds to F (float32 or float64; finite). riders: [R, k], numbers to be summed per sequence over all
    context-parallel ranks. half_life: tokens after which x counts half; `math.inf` for no decay.
    Returns F [R] in the dtype of x, and totals [S, k] float64, the same on every rank.

    Collectives: one all-gather over `group` of [S, C + k] float64 per rank, with zigzag and two riders 32 bytes per
    sequence and rank, whatever the length. `group=None` means that this rank holds the sequences whole: same code, no
    collective. Every rank of the group must call, also those without rows. kernels: `auto` (Triton on a GPU), `triton`, `torch`.
    """
    rate = decay_rate(half_life)
    _check_scan(x, riders, plan)
    check_group(plan, group)
    if takes_triton(kernels, x, (torch.float32, torch.float64)):
        from megatron_fipo.objective.kernels.launch import fused_scan

        return fused_scan(x, riders, plan, rate, group)
    x64 = x.double()

    carry, aggregate = _carry_inside_segments(x64, plan.levels, rate)
    at_chunk_start = aggregate.view_as(plan.lead) * _power(plan.lead, rate)
    sums = riders.new_zeros(plan.num_sequences, riders.shape[1], dtype=torch.float64)
    sums.index_add_(0, plan.row_sequence, riders.double())

    gathered = all_gather(torch.cat([at_chunk_start, sums], dim=1), group)  # [cp, S, C + k]
    aggregates, totals = gathered.split([plan.lead.shape[1], riders.shape[1]], dim=2)
    weights = _power(plan.distance, rate) * plan.follows
    behind_chunk = torch.einsum(
        "rsq,rsqc->sc", aggregates, weights
    )  # F at the first position after each chunk

    future_kl = (
        x64 + 2.0**-rate * carry + _power(plan.row_distance, rate) * behind_chunk.view(-1)[plan.row_segment]
    )
    return future_kl.to(x.dtype), totals.sum(dim=0)


def _carry_inside_segments(x: Tensor, levels: tuple[Level, ...], rate: float) -> tuple[Tensor, Tensor]:
    """What lies behind each element within its segment, seen from the next element; and each segment's aggregate.

    An element of this level spans 2^(−rate) worth of decay. Elements sit in a [blocks, 128] grid; a block's carry comes
    from the level above, where blocks are the elements.
    """
    level, above = levels[0], levels[1:]
    grid = x.new_zeros(level.blocks * BLOCK).index_copy_(0, level.slot, x).view(level.blocks, BLOCK)
    place = torch.arange(BLOCK, device=x.device, dtype=x.dtype)
    gap = (place[:, None] - place - 1).clamp(min=0)
    carry = grid @ _power(gap, rate).tril(-1)  # carry[:, k] = Σ_{j>k} γ^(j−k−1)·grid[:, j]
    aggregate = grid @ _power(place, rate)
    if above:
        block_carry, aggregate = _carry_inside_segments(aggregate, above, min(rate * BLOCK, LARGEST_RATE))
        carry = carry + block_carry[:, None] * _power(BLOCK - 1 - place, rate)
    return carry.view(-1)[level.slot], aggregate


def _power(distance: Tensor, rate: float) -> Tensor:
    """γ^distance for distances ≥ 0; 1 at distance 0 for every γ, 0 included."""
    return torch.exp2(distance * -rate)


def decay_rate(half_life: float) -> float:
    """−log2 γ."""
    if not half_life > 0:
        raise ValueError(f"half_life must be positive, not {half_life}")
    return min(1.0 / half_life, LARGEST_RATE)


def all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[S, ...] on every rank → [cp, S, ...]. One all-gather, or none without a group."""
    if group is None:
        return local.unsqueeze(0)
    gathered = local.new_empty(group.size() * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.view(group.size(), *local.shape)


def _check_scan(x: Tensor, riders: Tensor, plan: ScanPlan) -> None:
    if x.shape != (plan.num_rows,) or riders.ndim != 2 or riders.shape[0] != plan.num_rows:
        raise ValueError(
            f"x {list(x.shape)} and riders {list(riders.shape)} do not fit a plan of {plan.num_rows} rows"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, not {x.dtype}")


def check_group(plan: ScanPlan, group: dist.ProcessGroup | None) -> None:
    """ValueError unless the group has as many ranks as the plan was made for."""
    ranks = 1 if group is None else group.size()
    if ranks != plan.context_parallel_size:
        raise ValueError(
            f"the plan is for {plan.context_parallel_size} context-parallel ranks, but the group has {ranks}"
        )
