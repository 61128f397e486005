"""Print what a plan estimates: memory, the time of an iteration, what limits it, and what it rests on."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

from rich.console import Console, RenderableType

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate
from megatron_fipo.plan.iteration import Iteration
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.memory.engine import EngineMemory
from megatron_fipo.plan.table import GIB, duration, figure, table, with_interval

RATES = {field.name for field in fields(Machine)}
"""Figures of a machine."""
COLUMNS = 6
"""Stages that are printed beside each other, at most: the first ones, the fullest and the last."""
MODES = {
    "synchronous": "phases follow each other",
    "one_step_off": "rollout beside old log-probs and update",
    "fully_asynchronous": "rollout beside all others",
}


def memory_table(case: Case, memory: Sequence[Breakdown]) -> RenderableType:
    """Of each pipeline stage, in GiB; MiB for small models."""
    fullest = max(range(len(memory)), key=lambda stage: memory[stage].total.value)
    shown, most = _shown(len(memory), fullest), memory[fullest].total
    unit, scale = ("GiB", GIB) if most.value >= GIB else ("MiB", 2**20)
    device = case.machine.device_bytes
    made = table(
        f"Memory of a trainer rank by pipeline stage, in {unit}", "part", *(str(stage) for stage in shown)
    )
    for part in memory[0].parts:
        made.add_row(part, *(figure(memory[stage].parts[part].value / scale) for stage in shown))
    made.add_section()
    made.add_row("sum", *(figure(memory[stage].total.value / scale) for stage in shown))
    made.add_row(
        f"of {figure(device / scale)}", *(f"{memory[stage].total.value / device:.0%}" for stage in shown)
    )
    made.caption = f"stage {fullest}: {with_interval(most, scale)} {unit}"
    return made


def engine_table(case: Case, memory: EngineMemory, node: Breakdown) -> RenderableType:
    """What the engines hold, and the host memory of a node."""
    rollout, held = case.config.rollout, case.workload().held_tokens
    made = table("Engines and nodes")
    unit, size = case.machine.unit, rollout.engine_tensor_parallel_size
    devices = f"{rollout.num_engines:,} of {size} {unit}{'s' if size > 1 else ''}, {rollout.placement}"
    made.add_row("engines", devices)
    made.add_row(f"weights per {unit}", f"{figure(memory.weights / GIB)} GiB")
    made.add_row(
        "cache of an engine",
        f"{memory.cache_tokens.value:,.0f} tokens: {memory.sequences(held).value:,.0f} responses, which hold "
        f"{held:,.0f} on average",
    )
    parts = ", ".join(f"{name} {figure(part.value / GIB)}" for name, part in node.parts.items() if part.value)
    made.add_row("host memory of a node", f"{with_interval(node.total, GIB)} GiB: {parts}")
    return made


def iteration_table(case: Case, one: Iteration) -> RenderableType:
    """Phases of the iteration at the end of training."""
    config, mean = case.config, case.workload().response.mean
    made = table(
        f"One iteration at a mean response of {mean:,.0f} tokens, in seconds",
        "phase",
        "estimate",
        "low",
        "high",
        "largest part",
    )
    for name, phase in (("rollout", one.rollout), ("old log-probs", one.score), ("update", one.update)):
        largest = f"{phase.largest} {figure(phase.parts[phase.largest].value)}"
        made.add_row(name, *_numbers(phase.total), largest)
    made.add_row("weight sync", *_numbers(one.sync), "")
    made.add_row(f"evaluation / {config.evaluation.every}", *_numbers(one.evaluation), "")
    made.add_row(f"checkpoint / {config.checkpoint.every}", *_numbers(one.save), "")
    made.add_section()
    made.add_row("iteration", *_numbers(one.total), one.binding)
    made.caption = f"{config.rollout.mode}: {MODES[config.rollout.mode]}"
    return made


def result_table(case: Case, one: Iteration, run: Estimate) -> RenderableType:
    """What the iteration gives, and the time of the complete run."""
    made, unit = table("Result"), case.machine.unit
    made.add_row("limited by", one.binding)
    made.add_row(f"trained tokens/s/{unit}", f"{with_interval(one.rate)}, over all {one.devices:,} {unit}s")
    made.add_row(f"generated tokens/s/{unit}", with_interval(one.generated_rate))
    made.add_row("idle", f"trainer {one.trainer_idle:.0%}, engines {one.engine_idle:.0%} of the time")
    made.add_row("staleness", f"{one.staleness:.1f} weight versions on average")
    made.add_row(
        f"{case.config.iterations:,} iterations",
        f"{duration(run)}, {run.value * one.devices / 3600:,.0f} {unit}-hours, without failures",
    )
    return made


def update_table(one: Iteration) -> RenderableType:
    """The update and the pass before it, by part, in seconds."""
    made = table("Trainer, in seconds by part", "part", "old log-probs", "update", "low", "high")
    for part, update in one.update.parts.items():
        score = one.score.parts.get(part)
        if update.value or (score and score.value):
            made.add_row(part, figure(score.value) if score else "", *_numbers(update))
    return made


def print_basis(case: Case, estimates: Sequence[Estimate], console: Console) -> None:
    """What was assumed, what the figures were calibrated on, and which were not."""
    assumed = "; ".join(
        f"{item.name.replace('_', ' ')} {getattr(case.assumptions, item.name):g}"
        for item in fields(case.assumptions)
        if getattr(case.assumptions, item.name) is not None
    )
    console.print(
        f"Machine: {case.machine.name} ({case.machine.device}). Assumed: {assumed}.", highlight=False
    )
    for line in _basis(estimates):
        console.print(line, highlight=False)


def _basis(estimates: Sequence[Estimate]) -> Iterator[str]:
    sources = sorted(frozenset().union(*(estimate.sources for estimate in estimates)))
    unknown = sorted(frozenset().union(*(estimate.not_calibrated for estimate in estimates)))
    if sources:
        yield f"Calibrated on: {'; '.join(sources)}."
    if unknown:
        yield f"Not calibrated on this machine: {', '.join(unknown)}."
    if any(name.split()[0] in RATES for name in unknown):
        yield "`megatron-fipo calibrate` measures the rates of a machine."


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    return figure(estimate.value), figure(estimate.low), figure(estimate.high)


def _shown(stages: int, fullest: int) -> list[int]:
    if stages <= COLUMNS:
        return list(range(stages))
    return sorted({*range(COLUMNS - 2), fullest, stages - 1})
