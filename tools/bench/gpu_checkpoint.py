"""A distributed checkpoint: saved, loaded into a new policy, and the next step again. The bits must be the same.

python -m tools.bench.gpu_checkpoint
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.config import ModelConfig, OptimizerSettings
from megatron_fipo.trainer.rank_model import RankModel, StepResult
from tests.gpu.policies import Shape, deterministic, random_shard, with_old_log_probs
from tools.bench.gpu_models import MODELS, OBJECTIVE, TOY, obstacle, with_policy
from tools.bench.gpu_offload import weights_of
from tools.bench.harness import Bench, Cases, run_cases, synchronize
from tools.bench.report import FAILED, FIGURE, OK, SKIPPED, Row, reason

SECTION = "resume"
NAME = "0.5B"
RATE = 1e-4
LENGTHS = ([64] * 4, [1_984] * 4)
TOY_LENGTHS = ([5] * 4, [10] * 4)
Outcome = tuple[StepResult, list[Tensor]]
"""A step's result and the weights after it."""


def next_step(bench: Bench, policy: RankModel, shape: Shape, seed: int) -> Outcome:
    """A step on a mini-batch of this seed; old log-probs are all −8, so that they do not depend on the policy."""
    shard: PackedShard = random_shard(bench, shape, *bench.pick(LENGTHS, TOY_LENGTHS), seed=seed)
    shards = with_old_log_probs([shard], [torch.full((shard.num_rows,), -8.0)])
    return policy.policy_step(shards, OBJECTIVE, RATE), weights_of(policy)


def save_and_resume(bench: Bench) -> Iterator[Row]:
    """Two steps with a save between them; then a new policy, with other random weights, loads and repeats the second."""
    shape, lengths = bench.pick((MODELS[NAME], LENGTHS), (TOY, TOY_LENGTHS))
    model, optimizer = ModelConfig(), OptimizerSettings(lr=RATE)
    if why := obstacle(bench, shape, model, lengths):
        yield reason(SKIPPED, SECTION, f"checkpoint of {NAME}", why, False)
        return
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, deterministic():
        folder = Path(name)

        def saved(policy: RankModel) -> Iterator[Row]:
            next_step(bench, policy, shape, seed=1)
            yield save_row(bench, policy, folder)
            outcomes.append(next_step(bench, policy, shape, seed=2))

        def resumed(policy: RankModel) -> Iterator[Row]:
            with torch.no_grad():
                for parameter in policy.modules[0].parameters():
                    parameter.zero_()
            yield load_row(bench, policy, folder)
            outcomes.append(next_step(bench, policy, shape, seed=2))

        yield from with_policy(bench, shape, model, saved, optimizer)
        yield from with_policy(bench, shape, model, resumed, optimizer)
    yield equal_row(*outcomes)


def save_row(bench: Bench, policy: RankModel, folder: Path) -> Row:
    synchronize(bench)
    start = time.perf_counter()
    writer = CheckpointWriter()
    writer.start(policy.modules, policy.optimizer, folder, asynchronous=True)
    waited = time.perf_counter() - start
    writer.finished(blocking=True)
    seconds = time.perf_counter() - start
    size = folder_bytes(folder)
    result = (
        f"training waits {waited:.2f} s; {size / 1e9:.2f} GB written after {seconds:.2f} s, "
        f"{size / seconds / 1e9:.2f} GB/s"
    )
    figures: dict[str, float | str] = {
        "waits_seconds": waited,
        "written_seconds": seconds,
        "bytes": size,
        "bytes_per_second": size / seconds,
    }
    return Row(SECTION, f"save of {NAME}", FIGURE, result, figures)


def load_row(bench: Bench, policy: RankModel, folder: Path) -> Row:
    synchronize(bench)
    start = time.perf_counter()
    load_checkpoint(policy.modules, policy.optimizer, folder)
    synchronize(bench)
    seconds, size = time.perf_counter() - start, folder_bytes(folder)
    result = f"{seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s"
    figures: dict[str, float | str] = {"load_seconds": seconds, "bytes_per_second": size / seconds}
    return Row(SECTION, f"load of {NAME}", FIGURE, result, figures)


def equal_row(first: Outcome, again: Outcome) -> Row:
    """Statistics, gradient norm and weights of the step after the save, without and with a resume."""
    name = "the step after a resume has the same bits"
    moved = sum(not torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    same = first[0].statistics == again[0].statistics and first[0].grad_norm == again[0].grad_norm
    if moved or not same:
        why = f"{moved} of {len(first[1])} weights differ, statistics {'equal' if same else 'differ'}"
        return reason(FAILED, SECTION, name, why, True)
    if first[0].skipped:
        return reason(FAILED, SECTION, name, "the step was skipped", True)
    return Row(SECTION, name, OK, f"{len(first[1])} weights", {}, True)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


CASES: Cases = {"save and resume": save_and_resume}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
