"""Whether a run fits the memory of the GPUs at hand, before anything is built on them. Pure, but for reading a machine file.

The static part is certain: weights, gradients and optimizer of a rank, and the weights of an engine that shares its GPU. A run
whose static part exceeds the GPU is refused. The peak is an estimate, so a run above it is warned.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_fipo.config.card_rules import Finding, smallest
from megatron_fipo.environment import Card
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, exact
from megatron_fipo.plan.fit import fullest_stage, share_misfit
from megatron_fipo.plan.machine import DEFAULT_MACHINE, Machine
from megatron_fipo.plan.machine_file import load_machine, machine_names
from megatron_fipo.plan.memory.engine import engine_memory
from megatron_fipo.plan.memory.trainer import trainer_memory

GIB = 2**30
STATIC = ("weights", "gradients", "optimizer", "reference model")
NAMED = 4
"""Parts that a sentence lists, the largest first."""
FIX = (
    "use a larger GPU, share the model over more ranks (parallel.tensor_model_parallel_size, "
    "parallel.pipeline_model_parallel_size), or offload the optimizer (optimizer.cpu_offload)"
)


def machine_of(cards: Sequence[Card]) -> Machine:
    """The shipped machine with these GPUs; else the default one with the name and the memory of the smallest of them."""
    card = smallest(cards)
    for machine in map(load_machine, machine_names()):
        if machine.device == card.name:
            return machine
    default = load_machine(DEFAULT_MACHINE)
    return replace(
        default,
        name=f"{DEFAULT_MACHINE} with the memory of {card.name}",
        device=card.name,
        device_bytes=card.memory_bytes,
    )


def memory_findings(case: Case, cards: Sequence[Card]) -> list[Finding]:
    """What does not fit the smallest of these GPUs; `case.machine` has its figures (`machine_of`)."""
    card = smallest(cards)
    static = max(
        (_static(case, stage) for stage in range(case.config.parallel.pipeline_model_parallel_size)),
        key=lambda parts: parts.total.value,
    )
    if static.total.value > card.memory_bytes:
        return [
            Finding(
                f"a trainer rank needs {_gib(static.total.value)} GiB before it computes anything ({_parts(static)}), but "
                f"{card.name} has {_gib(card.memory_bytes)} GiB; {FIX}",
                fatal=True,
            )
        ]
    findings = []
    stage, peak = fullest_stage(case)
    if peak.total.value > card.memory_bytes:
        findings.append(
            Finding(
                f"a trainer rank of stage {stage} may run out of memory: it needs about {_gib(peak.total.value)} GiB at its peak "
                f"({_parts(peak)}), and {card.name} has {_gib(card.memory_bytes)} GiB; lower batch.max_tokens_per_micro_batch, or set "
                "model.recompute=full",
                fatal=False,
            )
        )
    if (share := share_misfit(case)) is not None:
        findings.append(Finding(share.reason, fatal=False))
    return findings


def _static(case: Case, stage: int) -> Breakdown:
    """What a rank of this stage holds during the complete run, and the weights of a colocated engine."""
    memory = trainer_memory(case, stage)
    parts = {name: memory.parts[name] for name in STATIC if name in memory.parts}
    if case.colocated and "quantization" not in case.config.rollout.vllm:
        parts["engine's weights"] = exact(engine_memory(case).weights)
    return Breakdown(parts)


def _parts(memory: Breakdown) -> str:
    """The largest parts, in GiB."""
    ordered = sorted(memory.parts.items(), key=lambda item: -item[1].value)[:NAMED]
    return ", ".join(f"{name} {_gib(part.value)}" for name, part in ordered)


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.1f}"
