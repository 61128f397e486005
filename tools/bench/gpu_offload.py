"""Steps with the optimizer's state in host memory: time, GPU memory, and whether the weights move as without.

python -m tools.bench.gpu_offload
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from megatron_fipo.config import ModelConfig, OptimizerSettings
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape, deterministic, random_shard, with_old_log_probs
from tools.bench.gpu_models import MODELS, OBJECTIVE, TOY, obstacle, with_policy
from tools.bench.harness import Bench, Cases, run_cases, synchronize
from tools.bench.report import FAILED, FIGURE, OK, SKIPPED, Row, duration, reason

SECTION = "offload"
NAME = "0.5B"
FRACTIONS = (0.0, 0.5, 1.0)
"""Of `optimizer.cpu_offload`."""
RATE = 1e-4
"""Large, so that a step moves most weights in bfloat16."""
COMPARED, TIMED = 2, 3
"""Steps after which weights are compared, and steps that are timed afterwards."""
TOLERANCE = 2e-2
"""Of the difference of two changes of the weights, relative to one (norms of all weights). Adam on the host rounds its float32
sums in another order, so that a weight near the middle of two bfloat16 numbers may become the other one."""
LENGTHS = ([64] * 4, [1_984] * 4)
TOY_LENGTHS = ([5] * 4, [10] * 4)


@dataclass(frozen=True)
class Trained:
    """A new policy after `COMPARED` steps, and more steps timed."""

    weights: list[Tensor]
    """On the CPU."""
    seconds: float
    """Median of a step."""
    state_bytes: int
    """Allocated between steps."""
    peak_bytes: int


def train(bench: Bench, policy: RankModel, shape: Shape) -> Trained:
    """Steps on one mini-batch, with old log-probs that differ from the policy's; the first ones are deterministic."""
    shard = random_shard(bench, shape, *bench.pick(LENGTHS, TOY_LENGTHS), seed=2)
    generator = torch.Generator().manual_seed(4)
    scores = policy.log_probs([shard])[0].cpu()
    shards = with_old_log_probs([shard], [scores + 0.02 * torch.randn(scores.shape, generator=generator)])
    for _ in range(COMPARED):
        policy.policy_step(shards, OBJECTIVE, RATE)
    weights = weights_of(policy)
    torch.use_deterministic_algorithms(False)  # it makes torch fill new memory
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(bench.pick(TIMED, 1)):
        synchronize(bench)
        start = time.perf_counter()
        policy.policy_step(shards, OBJECTIVE, RATE)
        synchronize(bench)
        seconds.append(time.perf_counter() - start)
    memory = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if bench.on_gpu else (0, 0)
    return Trained(weights, median(seconds), *memory)


def weights_of(policy: RankModel) -> list[Tensor]:
    """Copies on the CPU."""
    return [parameter.detach().cpu().clone() for parameter in policy.modules[0].parameters()]


def difference(start: list[Tensor], expected: list[Tensor], found: list[Tensor]) -> float:
    """Norm of the difference of two changes of the weights over the norm of the expected change. NaN if nothing moved."""

    def norm(left: list[Tensor], right: list[Tensor]) -> float:
        squares = [float((a.float() - b.float()).square().sum()) for a, b in zip(left, right, strict=True)]
        return sum(squares) ** 0.5

    moved = norm(start, expected)
    return norm(expected, found) / moved if moved else float("nan")


def offload(bench: Bench) -> Iterator[Row]:
    """Without, again without (the same bits), then with the fractions."""
    shape, lengths = bench.pick((MODELS[NAME], LENGTHS), (TOY, TOY_LENGTHS))
    start: list[Tensor] = []
    runs: list[Trained] = []

    def body(policy: RankModel) -> Iterator[Row]:
        if not start:
            start.extend(weights_of(policy))
        runs.append(train(bench, policy, shape))
        yield from ()

    for number, fraction in enumerate((FRACTIONS[0], *FRACTIONS)):
        name = f"optimizer.cpu_offload={fraction:g} of {NAME}"
        model = ModelConfig()
        if why := obstacle(bench, shape, model, lengths, offload=fraction):
            yield reason(SKIPPED, SECTION, name, why, False)
            continue
        optimizer = OptimizerSettings(lr=RATE, cpu_offload=fraction)
        with deterministic():  # Transformer Engine's attention asks when it is built
            yield from with_policy(bench, shape, model, body, optimizer)
        if number:
            yield from rows_of(name, fraction, start, runs[0], runs.pop())


def rows_of(name: str, fraction: float, start: list[Tensor], without: Trained, run: Trained) -> Iterator[Row]:
    """Equality and cost; without offload a repetition must have the same bits."""
    error = difference(start, without.weights, run.weights)
    allowed = TOLERANCE if fraction else 0.0
    correct = error <= allowed  # False for NaN
    result = f"{error:.1e} of the change in {COMPARED} steps differs from that without offload (at most {allowed:g})"
    yield Row(
        SECTION, f"update, {name}", OK if correct else FAILED, result, {"difference": error}, correctness=True
    )
    ratio = run.seconds / without.seconds
    result = (
        f"{duration(run.seconds)} ({ratio:.2f} times without), {run.state_bytes / 2**30:.1f} GiB between steps, "
        f"peak {run.peak_bytes / 2**30:.1f} GiB"
    )
    figures: dict[str, float | str] = {
        "step_seconds": run.seconds,
        "ratio": ratio,
        "state_bytes": run.state_bytes,
        "peak_bytes": run.peak_bytes,
    }
    yield Row(SECTION, f"step, {name}", FIGURE, result, figures)


CASES: Cases = {"host offload": offload}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
