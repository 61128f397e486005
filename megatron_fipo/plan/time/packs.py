"""Micro-batches of a mini-step: how many there are, and what one holds."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from megatron_fipo.batching.packing import micro_batch_multiple
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.layout import micro_batch_tokens
from megatron_fipo.plan.workload import Workload

SAMPLE = 512
"""Sequences that are packed at most to find how full micro-batches are."""


@dataclass(frozen=True)
class Packs:
    """The micro-batches of one optimizer step on a data-parallel rank. Amounts are means, of one context-parallel rank."""

    count: int
    tokens: float
    """With padding."""
    pairs: float
    """Pairs of a query and a key that it sees."""
    rows: float
    """Response tokens, which the head scores."""


def mini_step_packs(case: Case, progress: float = 1.0) -> Packs:
    """As `batching.packing.plan_micro_batches` packs them: best-fit decreasing, equally many on every rank.

    Ignored: that sequences of one rank cost more than those of another; the packer evens that out.
    """
    batch, parallel = case.config.batch, case.config.parallel
    return _packs(
        case.workload(progress),
        sequences=batch.mini_batch_prompts * batch.responses_per_prompt,
        budget=micro_batch_tokens(case.config),
        multiple=parallel.length_multiple,
        pack_multiple=parallel.pack_multiple(case.config.model.token_multiple),
        data=parallel.data_parallel_size,
        context=parallel.context_parallel_size,
        groups=micro_batch_multiple(
            parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        ),
    )


@lru_cache(maxsize=4096)  # a search asks for the same packs under many other sizes
def _packs(
    work: Workload,
    *,
    sequences: int,
    budget: int,
    multiple: int,
    pack_multiple: int,
    data: int,
    context: int,
    groups: int,
) -> Packs:
    lengths = _lengths(work, min(sequences, SAMPLE), multiple, budget)
    bins = _bins(lengths, budget) * sequences / len(lengths)
    count = ceil(bins / (data * groups)) * groups
    share = sequences / (data * count * context)
    return Packs(
        count=count,
        tokens=share * (work.prompt_tokens + work.response.mean + (multiple - 1) / 2)
        + (pack_multiple - multiple) / (2 * context),
        pairs=share * work.mean_square / 2,
        rows=share * work.response.mean,
    )


def _lengths(work: Workload, count: int, multiple: int, budget: int) -> list[int]:
    """Padded lengths of `count` sequences, spread evenly over the law; at most the budget, which holds the longest."""
    points = work.response.quantiles
    picked = (points[int((index + 0.5) * len(points) / count)] for index in range(count))
    return [min(budget, ceil((work.prompt_tokens + length) / multiple) * multiple) for length in picked]


def _bins(lengths: list[int], budget: int) -> int:
    """Micro-batches that best-fit decreasing needs."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        index = bisect_left(free, length)
        space = free.pop(index) if index < len(free) else budget
        insort(free, space - length)
    return len(free)
