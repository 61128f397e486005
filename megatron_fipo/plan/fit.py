"""Whether a case fits its machine, and what is too large if it does not."""

import math
from dataclasses import dataclass

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown
from megatron_fipo.plan.memory.engine import engine_memory
from megatron_fipo.plan.memory.host import node_memory
from megatron_fipo.plan.memory.trainer import trainer_memory

GIB = 2**30
RECOMMENDED_SHARE = 0.9
"""Share of a device's memory that a searched layout may take by estimate: estimates have errors, and peaks vary with packs."""


@dataclass(frozen=True)
class Misfit:
    """Something that does not fit."""

    reason: str
    """A clause, such as "a trainer rank of stage 0 needs 97.2 GiB of 80.0 (activations 60.1)"."""
    fatal: bool
    """Whether the run cannot work; otherwise a warning."""


def fullest_stage(case: Case) -> tuple[int, Breakdown]:
    """The pipeline stage whose ranks need most memory, and what they need.

    Stages between the second and the last have the second's state and fewer micro-batches in flight.
    """
    last = case.config.parallel.pipeline_model_parallel_size - 1
    memory = {stage: trainer_memory(case, stage) for stage in sorted({0, min(1, last), last})}
    stage = max(memory, key=lambda index: memory[index].total.value)
    return stage, memory[stage]


def misfits(case: Case) -> list[Misfit]:
    """Everything that does not fit, the trainer first."""
    found = [_trainer(case), _engine(case), _host(case)]
    return [misfit for misfit in found if misfit is not None]


def _trainer(case: Case) -> Misfit | None:
    stage, memory = fullest_stage(case)
    needed, available = memory.total.value, case.machine.device_bytes
    if needed <= RECOMMENDED_SHARE * available:
        return None
    part = memory.largest
    return Misfit(
        f"a trainer rank of stage {stage} needs {needed / GIB:.1f} GiB of {available / GIB:.1f} "
        f"({part} {memory.parts[part].value / GIB:.1f})",
        fatal=needed > available,
    )


def _engine(case: Case) -> Misfit | None:
    if (share := share_misfit(case)) is not None:
        return share
    longest = case.config.rollout.longest_sequence
    memory = engine_memory(case)
    if memory.cache_tokens.value >= longest:
        return None
    return Misfit(
        f"an engine's cache holds {memory.cache_tokens.value:,.0f} tokens, fewer than the longest prompt and response of "
        f"{longest:,} (weights take {memory.weights / GIB:.1f} of {case.machine.device_bytes / GIB:.1f} GiB per device); "
        "raise rollout.engine_tensor_parallel_size",
        fatal=True,
    )


def share_misfit(case: Case) -> Misfit | None:
    """A share of the device that is not free for a colocated engine on vLLM; `local` takes memory as it needs it."""
    rollout = case.config.rollout
    if not case.colocated or rollout.engine != "vllm" or rollout.gpu_memory_share <= free_share(case):
        return None
    return Misfit(
        f"rollout.gpu_memory_share={rollout.gpu_memory_share:g} is not free beside a trainer rank, which keeps "
        f"{engine_memory(case).trainer.value / GIB:.1f} of {case.machine.device_bytes / GIB:.1f} GiB while engines sample; lower it "
        f"to {free_share(case):.2f}",
        fatal=True,
    )


def free_share(case: Case) -> float:
    """Share of a device, in hundredths, that the trainer leaves to a colocated engine: vLLM starts only if its share is free."""
    return math.floor(100 * (1 - engine_memory(case).trainer.value / case.machine.device_bytes)) / 100


def _host(case: Case) -> Misfit | None:
    memory = node_memory(case)
    needed, available = memory.total.value, case.machine.host_bytes
    if needed <= available:
        return None
    part = memory.largest
    return Misfit(
        f"a node needs {needed / GIB:,.0f} GiB of host memory of {available / GIB:,.0f} ({part} "
        f"{memory.parts[part].value / GIB:,.0f})",
        fatal=False,
    )
