"""A training step of Qwen2.5-shaped models on packs of 20,480 tokens: speed, MFU, memory, the loss path's share.

python -m tools.bench.gpu_step
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import ModelConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape
from tools.bench.gpu_ceilings import peak_flops
from tools.bench.gpu_models import (
    LONGEST,
    LR,
    MODELS,
    OBJECTIVE,
    PACKS,
    TOY,
    TOY_PACKS,
    WARM_UP,
    obstacle,
    packs,
    settings,
    with_policy,
)
from tools.bench.gpu_profile import profile_steps, waits_of
from tools.bench.harness import (
    Bench,
    Case,
    Cases,
    Timing,
    is_out_of_memory,
    release,
    run_cases,
    summary,
    synchronize,
    time_calls,
    time_small,
)
from tools.bench.report import FIGURE, SKIPPED, Row, aimed, duration, reason

SECTION = "step"
MFU_AIM, LOSS_AIM = 0.5, 0.01
STEPS = 5
FP8_RECIPE = ModelConfig().fp8_recipe


@dataclass(frozen=True)
class Step:
    """Figures of one pack."""

    seconds: Timing
    tokens: int
    flops: float
    peak_bytes: int
    loss: Timing
    """Of forward and gradient of the policy loss on the same rows."""
    loss_by_host: Timing
    waits: int
    """Times in one step that the host waited for the device."""
    logits_mb: int
    """`head.logits_memory_mb` of the measured steps, from the memory that the first two left free."""


def step_flops(shape: Shape, lengths: Sequence[int], rows: int) -> float:
    """Of forward and backward: 6 per matrix weight and token (the output layer: per response row), and of causal attention
    12 · heads · head size per layer and visible pair, L·(L + 1)/2 pairs in a sequence. Recomputation does not count.
    """
    query, key = shape.heads * shape.head_size, shape.groups * shape.head_size
    layer = shape.hidden * (2 * query + 2 * key + 3 * shape.ffn)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return (
        6 * (sum(lengths) * shape.layers * layer + rows * shape.hidden * shape.vocabulary)
        + 12 * shape.layers * query * pairs
    )


def measure_steps(
    bench: Bench, policy: RankModel, shape: Shape, model: ModelConfig, name: str
) -> Iterator[Row]:
    """Both packs with one policy. torch.OutOfMemoryError if it does not fit."""
    peak, source = peak_flops(bench)
    for pack, shards in packs(bench, policy, shape, model):
        step = measure_pack(bench, policy, shape, shards)
        yield from rows_of(
            f"{name}, {pack}, recompute {model.recompute}", step, peak, source, has_aim=model.fp8 == "none"
        )


def measure_pack(bench: Bench, policy: RankModel, shape: Shape, shards: list[PackedShard]) -> Step:
    rows = shards[0].num_rows
    lengths = shards[0].cu_seqlens_padded.diff().tolist()
    seconds, peak = time_steps(bench, policy, shards)
    log_probs = shards[0].rows.old_log_probs + 0.01
    entropy = torch.rand_like(log_probs)

    def loss() -> tuple[torch.Tensor, ...]:
        leaf = log_probs.detach().requires_grad_()
        return torch.autograd.grad(
            policy_loss(leaf, entropy, shards[0].rows, OBJECTIVE, None, kernels="auto").loss_sum, leaf
        )

    return Step(
        seconds=seconds,
        tokens=sum(lengths),
        flops=step_flops(shape, lengths, rows),
        peak_bytes=peak,
        loss=time_small(bench, [loss] * 4),
        loss_by_host=time_calls(bench, loss),
        waits=waits_of(bench, lambda: policy.policy_step(shards, OBJECTIVE, LR)).total(),
        logits_mb=policy.head.logits_memory_mb or 0,
    )


def time_steps(bench: Bench, policy: RankModel, shards: list[PackedShard]) -> tuple[Timing, int]:
    """Time of a step after a warm-up, and the peak of allocated bytes (0 on a CPU)."""
    for _ in range(bench.pick(WARM_UP, 1)):
        policy.policy_step(shards, OBJECTIVE, LR)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [_step_seconds(bench, policy, shards) for _ in range(bench.pick(STEPS, 1))]
    return summary(seconds), torch.cuda.max_memory_allocated() if bench.on_gpu else 0


def _step_seconds(bench: Bench, policy: RankModel, shards: list[PackedShard]) -> float:
    synchronize(bench)
    start = time.perf_counter()
    result = policy.policy_step(shards, OBJECTIVE, LR)
    synchronize(bench)
    if result.skipped:
        raise AssertionError(f"the step was skipped: gradient norm {result.grad_norm}")
    return time.perf_counter() - start


def rows_of(name: str, step: Step, peak: float, source: str, has_aim: bool) -> Iterator[Row]:
    """Speed and memory, then the loss path's share; FP8 is compared with the BF16 peak and has no aim."""
    seconds = step.seconds.median
    mfu, share = step.flops / seconds / peak, step.loss.median / seconds
    figures: dict[str, float | str] = {
        "tokens": step.tokens,
        "tokens_per_second": step.tokens / seconds,
        "flops": step.flops,
        "mfu": mfu,
        "peak_flops": peak,
        "peak_flops_from": source,
        "peak_bytes": step.peak_bytes,
        "host_waits": step.waits,
        "logits_memory_mb": step.logits_mb,
    } | step.seconds.figures("step")
    result = (
        f"{duration(seconds)}, {step.tokens / seconds:,.0f} tokens/s, MFU {100 * mfu:.1f} % of {peak / 1e12:,.0f} TFLOP/s, "
        f"{step.peak_bytes / 2**30:.1f} GiB, host waits {step.waits}"
    )
    title = f"{name} (aim MFU >= {100 * MFU_AIM:.0f} %)" if has_aim else name
    yield Row(SECTION, title, aimed(mfu >= MFU_AIM) if has_aim else FIGURE, result, figures)
    by_host = step.loss_by_host
    figures = {"share": share} | step.loss.figures("loss") | by_host.figures("loss_launched_by_host")
    result = (
        f"{100 * share:.3f} % ({duration(step.loss.median)}; launched by the host {duration(by_host.median)})"
    )
    title = f"loss path of {name} (aim < {100 * LOSS_AIM:.0f} %)"
    yield Row(SECTION, title, aimed(share < LOSS_AIM), result, figures)


Body = Callable[[Bench, RankModel, Shape, ModelConfig, str], Iterator[Row]]


def case(name: str, shape: Shape, recipe: str | None = None, body: Body = measure_steps) -> Case:
    """`body` on a new policy, in BF16 or FP8 with this recipe; with recomputed layers if it does not fit without."""

    def run(bench: Bench) -> Iterator[Row]:
        title = f"{name} FP8 {recipe}" if recipe else f"{name} BF16"
        used, lengths = bench.pick((shape, PACKS[LONGEST]), (TOY, TOY_PACKS[LONGEST]))
        why = None
        for recompute in ("none", "full"):
            model = settings(recipe, recompute)
            if why := obstacle(bench, used, model, lengths):
                continue
            try:
                yield from with_policy(
                    bench, used, model, lambda policy, model=model: body(bench, policy, used, model, title)
                )
                return
            except RuntimeError as error:
                if recompute == "full" or not is_out_of_memory(error):
                    raise
                print(f"{name} does not fit without recomputation: {error}")
            release(bench)
        if why:
            yield reason(SKIPPED, SECTION, title, why, False)

    return run


CASES: Cases = {
    "0.5B BF16": case("0.5B", MODELS["0.5B"]),
    "1.5B BF16": case("1.5B", MODELS["1.5B"]),
    "1.5B FP8": case("1.5B", MODELS["1.5B"], FP8_RECIPE),
    "profile": case("1.5B", MODELS["1.5B"], body=profile_steps),
}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
