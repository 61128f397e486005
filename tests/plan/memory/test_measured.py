"""A trainer rank's memory as predicted, against what training steps of the portable layers really allocate."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from megatron_fipo.config import HeadConfig, ParallelConfig
from megatron_fipo.families.family import Experts
from megatron_fipo.plan.memory.trainer import trainer_memory
from tests.gpu.policies import Shape
from tests.plan.memory.measured import Run, case_of, measure

MIXTURE = Experts(8, 2, 96, normalized=True)
WIDE = Experts(16, 8, 32, normalized=True)
"""Half of the experts of each token: the copies are most of a layer."""
LARGE_VOCABULARY = Shape(2, 128, 256, 8, 4, 8192, tied=False)


def layout(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    dp: int = 1,
    sp: bool = False,
    overlap: bool = False,
    ep: int = 1,
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        overlap_communication=overlap,
        expert_model_parallel_size=ep,
    )


RUNS = {
    "one rank": Run(),
    "kept logits": Run(
        shape=LARGE_VOCABULARY, tied=False, head=HeadConfig(workspace_mb=4, logits_memory_mb=64)
    ),
    "tp2 sp, selective": Run(layout(tp=2, sp=True), recompute="selective"),
    "cp2, full": Run(layout(cp=2), recompute="full"),
    "pp2 vpp2": Run(layout(pp=2, vpp=2), micro_batches=4),
    "dp2": Run(layout(dp=2, overlap=True), micro_batches=2),
    "experts": Run(experts=MIXTURE),
    "experts dp2 ep2, full": Run(layout(dp=2, ep=2), experts=WIDE, recompute="full"),
    "experts tp2 sp ep2": Run(layout(tp=2, sp=True, ep=2), experts=WIDE),
}
SLOW_RUNS = {
    "one rank, untied, full": Run(tied=False, recompute="full"),
    "pp2": Run(layout(pp=2), micro_batches=3),
    "head norms": Run(head_norms=True),
    "head norms, selective": Run(head_norms=True, recompute="selective"),
    "large workspace": Run(shape=LARGE_VOCABULARY, tied=False, head=HeadConfig(workspace_mb=24)),
    "tp2": Run(layout(tp=2)),
    "tp2 sp, full": Run(layout(tp=2, sp=True), recompute="full"),
    "tp2 sp, large vocabulary": Run(
        layout(tp=2, sp=True), shape=LARGE_VOCABULARY, tied=False, head=HeadConfig(workspace_mb=12)
    ),
    "cp2": Run(layout(cp=2)),
    "cp2, selective": Run(layout(cp=2), recompute="selective"),
    "pp4, untied": Run(layout(pp=4), micro_batches=6, tied=False),
    "pp4, fewer micro-batches than stages": Run(layout(pp=4), micro_batches=2),
    "pp2 vpp2, full": Run(layout(pp=2, vpp=2), micro_batches=4, recompute="full"),
    "tp2 pp2 sp": Run(layout(tp=2, pp=2, sp=True), micro_batches=4),
    "tp2 cp2 sp, selective": Run(layout(tp=2, cp=2, sp=True), recompute="selective"),
    "pp2 cp2": Run(layout(pp=2, cp=2), micro_batches=3),
    "experts, softmax over all": Run(experts=replace(MIXTURE, normalized=False)),
    "experts, selective": Run(experts=MIXTURE, recompute="selective"),
    "experts, full": Run(experts=WIDE, recompute="full"),
    "experts, many": Run(experts=Experts(128, 4, 32, normalized=True)),
    "experts in some layers": Run(experts=replace(MIXTURE, dense_layers=(1, 3))),
    "experts in some layers, full": Run(experts=replace(MIXTURE, dense_layers=(0, 2)), recompute="full"),
    "experts dp2": Run(layout(dp=2), experts=MIXTURE, micro_batches=2),
    "experts dp2 ep2": Run(layout(dp=2, ep=2), experts=WIDE),
    "experts tp2 sp ep2, full": Run(layout(tp=2, sp=True, ep=2), experts=WIDE, recompute="full"),
    "experts cp2 ep2, full": Run(layout(cp=2, ep=2), experts=MIXTURE, recompute="full"),
    "experts pp2 dp2 ep2": Run(layout(pp=2, dp=2, ep=2), experts=MIXTURE, micro_batches=3),
    "experts pp2 vpp2": Run(layout(pp=2, vpp=2), experts=MIXTURE, micro_batches=4),
    "experts in some layers pp2 vpp2": Run(
        layout(pp=2, vpp=2), experts=replace(MIXTURE, dense_layers=(0,)), micro_batches=4
    ),
    "pp2 dp2, not distributed": Run(layout(pp=2, dp=2), micro_batches=2, distributed=False),
}
ALL = [pytest.param(run, id=name) for name, run in RUNS.items()]
ALL += [pytest.param(run, id=name, marks=pytest.mark.slow) for name, run in SLOW_RUNS.items()]


@pytest.mark.parametrize("run", ALL)
def test_a_step_takes_what_is_predicted(run: Run, tmp_path: Path):
    """The peak within 10 % on every stage, shards within 5 %, and state to the byte."""
    measured, case = measure(run, tmp_path), case_of(run, tmp_path)
    for stage in range(run.parallel.pipeline_model_parallel_size):
        ranks = [rank for rank in measured if rank.stage == stage]
        parts = {name: part.value for name, part in trainer_memory(case, stage).parts.items()}
        step = sum(parts[name] for name in ("activations", "layer workspace", "head", "communication"))
        peak = max(rank.peak for rank in ranks)
        assert step == pytest.approx(peak, rel=0.1), f"stage {stage}: {100 * (step / peak - 1):+.1f} %"
        assert parts["packs"] == pytest.approx(mean(rank.packs for rank in ranks), rel=0.05)
        for rank in ranks:
            assert (rank.parameters, rank.gradients) == (parts["weights"], parts["gradients"])
        assert mean(rank.optimizer for rank in ranks) == parts["optimizer"]
