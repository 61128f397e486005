"""Prints how often each function of Megatron-Core is compiled over 50 packs of different lengths, as JSON.

    python -m tests.model.compilations FAMILY RECOMPUTE

A process of its own: on CPUs these functions are not compiled (`model/cpu.py`). Here they are, by torch.compile with a backend
that counts and runs what it is given, and with the settings of a GPU with Triton.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_fipo.model import cpu  # installs the platform; Megatron-Core is not imported yet

PACKS, LONGEST = 50, 120
COMPILED: Counter[str] = Counter()
compile_function = torch.compile


def counting_compile(function: Callable | None = None, **options: Any) -> Callable:
    if function is None:
        return lambda wrapped: counting_compile(wrapped, **options)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        COMPILED[function.__name__] += 1
        return graph.forward

    return compile_function(function, backend=backend, **options)


def train(folder: Path, family: str, recompute: str) -> dict[int, int]:
    """Old log-probs and an update on each of the packs; the compilations until then, after each."""
    from megatron_fipo.config import ParallelConfig
    from megatron_fipo.model import build
    from megatron_fipo.objective.config import ObjectiveConfig
    from megatron_fipo.trainer.rank_model import RankModel
    from tests.distributed.tiny import VOCABULARY, make_trajectories, settings, write_model
    from tests.gpu.policies import Shape, one_rank, pack
    from tools.bench.harness import Bench

    bench, generator, total = Bench(torch.device("cpu")), random.Random(0), {}
    with one_rank(bench, seed=1), mock.patch.object(build, "can_compile", return_value=True):
        shape = Shape(2, 32, 48, 4, 2, VOCABULARY, tied=False, positions=256)
        folder = write_model(folder, family=family, layers=2)
        policy = RankModel(**settings(folder, ParallelConfig(), recompute=recompute), device=bench.device)
        for number in range(PACKS):
            trajectories = make_trajectories(3, seed=number, longest=generator.randint(8, LONGEST))
            shard = pack(bench, shape, trajectories)
            (old,) = policy.log_probs([shard])
            policy.policy_step([shard.with_old_log_probs(old)], ObjectiveConfig(), lr=1e-3)
            total[number + 1] = COMPILED.total()
    return total


if __name__ == "__main__":
    torch.compiler.config.fail_on_recompile_limit_hit = True
    with mock.patch.object(cpu, "_identity_compile", counting_compile), tempfile.TemporaryDirectory() as path:
        total = train(Path(path), *sys.argv[1:])
    print(json.dumps({"functions": COMPILED, "total": total}))
