"""A training step of Qwen2.5-shaped models on packs of 20,480 tokens: speed, MFU, memory, the loss path's share.

python -m tools.bench.gpu_step
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import ModelConfig, OptimizerSettings
from megatron_fipo.config.gpu_rules import fp8_obstacle
from megatron_fipo.environment import find_accelerators
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape, new_policy, one_rank, random_shard, score, with_old_log_probs
from tools.bench.gpu_ceilings import peak_flops
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
MODELS = {
    "0.5B": Shape(24, 896, 4_864, 14, 2, 151_936, tied=True),
    "1.5B": Shape(28, 1_536, 8_960, 12, 2, 151_936, tied=True),
}
TOY = Shape(2, 32, 48, 4, 2, 61, tied=True, positions=256)
PACKS = {"1 x 20,480": ([1_024], [19_456]), "4 x 5,120": ([512] * 4, [4_608] * 4)}
TOY_PACKS = {"1 x 20,480": ([10], [50]), "4 x 5,120": ([5] * 4, [10] * 4)}
"""Lengths of prompts and responses."""
MFU_AIM, LOSS_AIM = 0.5, 0.01
LR, STEPS, WARM_UP = 1e-6, 5, 2
OBJECTIVE = ObjectiveConfig()
FP8_RECIPE = ModelConfig().fp8_recipe
PROFILE = Path(os.environ.get("GPU_CHECK_OUTPUT", ".")) / "step_profile.txt"


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


def packs(
    bench: Bench, policy: RankModel, shape: Shape, model: ModelConfig
) -> Iterator[tuple[str, list[PackedShard]]]:
    """Each pack by name, as a mini-batch of one micro-batch with old log-probs near the policy's own."""
    for index, (name, (prompts, responses)) in enumerate(bench.pick(PACKS, TOY_PACKS).items()):
        shard = random_shard(bench, shape, prompts, responses, seed=index, multiple=model.token_multiple)
        yield name, with_old_log_probs([shard], score(policy, [shard], drift=0.02, seed=index))


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
    for _ in range(bench.pick(WARM_UP, 1)):
        policy.policy_step(shards, OBJECTIVE, LR)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [_step_seconds(bench, policy, shards) for _ in range(bench.pick(STEPS, 1))]
    peak = torch.cuda.max_memory_allocated() if bench.on_gpu else 0
    log_probs = shards[0].rows.old_log_probs + 0.01
    entropy = torch.rand_like(log_probs)

    def loss() -> tuple[torch.Tensor, ...]:
        leaf = log_probs.detach().requires_grad_()
        return torch.autograd.grad(
            policy_loss(leaf, entropy, shards[0].rows, OBJECTIVE, None, kernels="auto").loss_sum, leaf
        )

    return Step(
        seconds=summary(seconds),
        tokens=sum(lengths),
        flops=step_flops(shape, lengths, rows),
        peak_bytes=peak,
        loss=time_small(bench, [loss] * 4),
        loss_by_host=time_calls(bench, loss),
        waits=count_waits(bench, lambda: policy.policy_step(shards, OBJECTIVE, LR)),
    )


def _step_seconds(bench: Bench, policy: RankModel, shards: list[PackedShard]) -> float:
    synchronize(bench)
    start = time.perf_counter()
    result = policy.policy_step(shards, OBJECTIVE, LR)
    synchronize(bench)
    if result.skipped:
        raise AssertionError(f"the step was skipped: gradient norm {result.grad_norm}")
    return time.perf_counter() - start


def count_waits(bench: Bench, call: Callable[[], object]) -> int:
    if not bench.on_gpu:
        call()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


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


def profile_steps(
    bench: Bench, policy: RankModel, shape: Shape, model: ModelConfig, name: str
) -> Iterator[Row]:
    """A step's time by kernel, into a file. Last, because a profiler affects later timings."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    order = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    with PROFILE.open("w", encoding="utf-8") as file:
        for pack, shards in packs(bench, policy, shape, model):
            for _ in range(WARM_UP):
                policy.policy_step(shards, OBJECTIVE, LR)
            synchronize(bench)
            with profile(activities=activities) as recorded:
                policy.policy_step(shards, OBJECTIVE, LR)
                synchronize(bench)
            table = recorded.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=100)
            file.write(f"=== {name}, {pack}, recompute {model.recompute}\n{table}\n")
    yield Row(SECTION, f"profile of {name}", FIGURE, f"in {PROFILE.name}")


Body = Callable[[Bench, RankModel, Shape, ModelConfig, str], Iterator[Row]]


def case(name: str, shape: Shape, recipe: str | None = None, body: Body = measure_steps) -> Case:
    """`body` on a new policy, in BF16 or FP8 with this recipe; with recomputed layers if it does not fit without."""

    def run(bench: Bench) -> Iterator[Row]:
        precision = f"FP8 {recipe}" if recipe else "BF16"
        if recipe and find_spec("transformer_engine") is None:
            raise ModuleNotFoundError("FP8", name="transformer_engine")
        if recipe and (obstacle := fp8_obstacle(recipe, find_accelerators())):
            yield reason(SKIPPED, SECTION, f"{name} {precision}", obstacle, False)
            return
        fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "layer_spec": "transformer_engine"} if recipe else {}
        for recompute in ("none", "full"):
            model = ModelConfig(recompute=recompute, **fp8)
            try:
                with one_rank(bench, seed=3):
                    used = bench.pick(shape, TOY)
                    policy = new_policy(bench, used, model, optimizer=OptimizerSettings(lr=LR))
                    yield from body(bench, policy, used, model, f"{name} {precision}")
                return
            except RuntimeError as error:
                if recompute == "full" or not is_out_of_memory(error):
                    raise
                print(f"{name} does not fit without recomputation: {error}")
            policy = None
            release(bench)

    return run


CASES: Cases = {
    "0.5B BF16": case("0.5B", MODELS["0.5B"]),
    "1.5B BF16": case("1.5B", MODELS["1.5B"]),
    "0.5B FP8": case("0.5B", MODELS["0.5B"], FP8_RECIPE),
    "1.5B FP8": case("1.5B", MODELS["1.5B"], FP8_RECIPE),
    "profile": case("1.5B", MODELS["1.5B"], body=profile_steps),
}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
