"""Steps over packs of 20 lengths in one process: what compiling for new lengths costs, and whether fused kernels are right.

python -m tools.bench.gpu_lengths
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
import torch
from torch._dynamo.utils import get_compilation_metrics

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings
from megatron_fipo.environment import can_compile
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import random_shard, with_old_log_probs
from tools.bench.gpu_models import LR, MODELS, OBJECTIVE, RECOMPUTED, TOY, obstacle, with_policy
from tools.bench.harness import Bench, Cases, run_cases, synchronize
from tools.bench.report import FAILED, FIGURE, OK, SKIPPED, Row, duration, reason

SECTION = "lengths"
NAME = "0.5B"
PACKS = 20
LONGEST, SHORTEST = 8_192, 512
"""Tokens of a pack."""
SEQUENCES = 4
DRIFT = 0.02
TOLERANCE = 0.02
"""Of losses with and without fused kernels, relative to the mean size of the losses: fused ones round to bfloat16 less often."""
UNFUSED = HeadConfig(kernels="torch", logits_memory_mb=0)
"""Head, loss and activation in plain torch."""


@dataclass(frozen=True)
class Passes:
    """What 20 packs took, in the order of `pack_lengths`."""

    scores: list[float]
    """Seconds of the old log-prob pass of each pack."""
    steps: list[float]
    losses: list[float]


def pack_lengths(bench: Bench) -> list[int]:
    """20 different lengths in random order."""
    shortest, longest = bench.pick((SHORTEST, LONGEST), (24, 120))
    drawn = np.random.default_rng(11).choice(np.arange(shortest, longest), PACKS, replace=False)
    return [int(length) for length in drawn]


def sequences(tokens: int) -> tuple[list[int], list[int]]:
    """Prompts and responses of a pack of exactly this many tokens."""
    prompt = max(1, tokens // (8 * SEQUENCES))
    responses = [tokens // SEQUENCES - prompt] * SEQUENCES
    responses[0] += tokens - tokens // SEQUENCES * SEQUENCES
    return [prompt] * SEQUENCES, responses


def run_packs(bench: Bench, policy: RankModel, shards: list[PackedShard], old: list[torch.Tensor]) -> Passes:
    """Score each pack and take a step at rate 0, which changes no weight. Fills `old` if it is empty."""
    passes = Passes([], [], [])
    generator = torch.Generator().manual_seed(5)
    for index, shard in enumerate(shards):
        seconds, (scores,) = _timed(bench, lambda shard=shard: policy.log_probs([shard]))
        passes.scores.append(seconds)
        if len(old) == index:
            old.append(scores.cpu() + DRIFT * torch.randn(scores.shape, generator=generator))
        ready = with_old_log_probs([shard], [old[index]])
        seconds, result = _timed(bench, lambda ready=ready: policy.policy_step(ready, OBJECTIVE, 0.0))
        passes.steps.append(seconds)
        passes.losses.append(result.statistics["policy/loss"])
    return passes


def _timed(bench: Bench, call):
    synchronize(bench)
    start = time.perf_counter()
    result = call()
    synchronize(bench)
    return time.perf_counter() - start, result


def compilations(skip: int) -> tuple[Counter[str], float]:
    """Compilations by function since the first `skip` ones of this process, and their seconds together."""
    found = get_compilation_metrics()[skip:]
    return Counter(str(each.co_name) for each in found), sum(
        each.entire_frame_compile_time_s or 0.0 for each in found
    )


@dataclass
class Packs:
    """The same for all policies."""

    lengths: list[int]
    shards: list[PackedShard]
    old: list[torch.Tensor]
    """Old log-probs, empty until the first policy has scored."""


def fused_rows(bench: Bench, policy: RankModel, packs: Packs, losses: list[float]) -> Iterator[Row]:
    """Times and compilations; fills `losses`."""
    before = len(get_compilation_metrics())
    passes = run_packs(bench, policy, packs.shards, packs.old)
    counts, seconds = compilations(before)
    losses.extend(passes.losses)
    yield time_row("old log-prob pass", packs.lengths, passes.scores)
    yield time_row("step", packs.lengths, passes.steps)
    yield compile_row(counts, seconds)


def unfused_rows(bench: Bench, policy: RankModel, packs: Packs, losses: list[float]) -> Iterator[Row]:
    """The same packs with plain torch, and without what torch.compile fuses."""
    with torch.compiler.set_stance("force_eager"):
        passes = run_packs(bench, policy, packs.shards, packs.old)
    yield loss_row(losses, passes.losses)
    yield time_row("step without fused kernels", packs.lengths, passes.steps)


def time_row(what: str, lengths: list[int], seconds: list[float]) -> Row:
    """The stall is what each pack takes beyond the median."""
    middle, longest = median(seconds), max(seconds)
    stall = sum(max(0.0, each - middle) for each in seconds)
    at = lengths[seconds.index(longest)]
    result = (
        f"median {duration(middle)}, longest {duration(longest)} ({at:,} tokens, number {seconds.index(longest) + 1}), "
        f"{duration(stall)} beyond the median in all"
    )
    figures: dict[str, float | str] = {"median_seconds": middle, "stall_seconds": stall}
    figures |= {
        f"seconds_of_{number:02}_with_{tokens}_tokens": each
        for number, (tokens, each) in enumerate(zip(lengths, seconds, strict=True), 1)
    }
    return Row(SECTION, f"{what} of {NAME}, {len(lengths)} lengths", FIGURE, result, figures)


def compile_row(counts: Counter[str], seconds: float) -> Row:
    name = f"compilations for {PACKS} lengths"
    if not can_compile():
        return reason(SKIPPED, SECTION, name, "functions are fused by torch.compile on a GPU only", False)
    by_name = ", ".join(f"{function} {count}" for function, count in counts.most_common())
    figures: dict[str, float | str] = {"compile_seconds": seconds, **counts}
    return Row(SECTION, name, FIGURE, f"{counts.total()} in {seconds:.1f} s: {by_name or 'none'}", figures)


def loss_row(fused: list[float], plain: list[float]) -> Row:
    """FAILED if a loss differs by more than the tolerance."""
    scale = mean(abs(loss) for loss in plain)
    errors = [abs(a - b) / scale for a, b in zip(fused, plain, strict=True)]
    correct = all(error <= TOLERANCE for error in errors)  # False for NaN
    error = max(errors)
    result = f"largest difference {error:.1e} of the mean loss (at most {TOLERANCE:g})"
    name = "losses with and without fused kernels"
    return Row(SECTION, name, OK if correct else FAILED, result, {"loss": error}, True)


def twenty_lengths(bench: Bench) -> Iterator[Row]:
    """Two policies with the same random weights, one after the other."""
    shape, model = bench.pick(MODELS[NAME], TOY), ModelConfig()
    if why := obstacle(bench, shape, model, sequences(bench.pick(LONGEST, 120))):
        yield reason(SKIPPED, SECTION, f"{PACKS} lengths", why, False)
        return
    lengths = pack_lengths(bench)
    shards = [
        random_shard(bench, shape, *sequences(tokens), seed=index) for index, tokens in enumerate(lengths)
    ]
    packs, losses = Packs(lengths, shards, []), list[float]()
    optimizer = OptimizerSettings(lr=LR, weight_decay=0.0)
    for rows, head in ((fused_rows, RECOMPUTED), (unfused_rows, UNFUSED)):
        yield from with_policy(
            bench,
            shape,
            model,
            lambda policy, rows=rows: rows(bench, policy, packs, losses),
            optimizer,
            head,
        )


CASES: Cases = {f"{PACKS} lengths": twenty_lengths}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
