"""All layouts of a run on N GPUs that fit, ranked by trained tokens per second and GPU of the complete iteration.

Three questions are separate, which keeps the search small:

    trainer    for each number of trainer GPUs: the layout with the shortest log-prob pass and update; of those within 3 % of
               it, the one that needs least memory
    engines    for each number of engine GPUs: the tensor-parallel size with the shortest rollout
    split      for each mode: the pair of both that gives the shortest iteration

A layout recomputes only as much as it must to fit, so that `recompute` is not searched but follows. Layouts that the
configuration's rules refuse are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.rules import validate
from megatron_fipo.errors import UserError
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate
from megatron_fipo.plan.fit import RECOMMENDED_SHARE, free_share, fullest_stage
from megatron_fipo.plan.iteration import Iteration, combine, evaluation_time
from megatron_fipo.plan.memory.engine import engine_memory
from megatron_fipo.plan.rollout import decoding_seconds, rollout_time
from megatron_fipo.plan.time.trainer import score_time, update_time
from megatron_fipo.plan.time.transfers import save_time, sync_time

TENSOR = ENGINE_TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8, 16)
CHUNKS = (None, 2, 4)
EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
RECOMPUTE = ("none", "selective", "full")
"""In the order of time."""
ABOUT = 0.03
"""Layouts whose times differ by this share are equally fast: estimates are no better."""
SPLITS = 16
"""Numbers of trainer GPUs that are tried, at most."""
MODES = ("synchronous", "one_step_off", "fully_asynchronous")
"""Values of rollout.mode."""


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    case: Case
    iteration: Iteration
    memory: Breakdown
    """Of the fullest trainer rank."""


@dataclass(frozen=True)
class _Trainer:
    case: Case
    memory: Breakdown
    score: Breakdown
    update: Breakdown

    @property
    def seconds(self) -> float:
        return self.score.total.value + self.update.total.value


@dataclass(frozen=True)
class _Engines:
    case: Case
    rollout: Breakdown
    evaluation: Estimate


def search(case: Case, devices: int, modes: Sequence[str] = MODES) -> list[Found]:
    """The best layout of each split of `devices` GPUs, fastest first.

    Empty if nothing fits. UserError for less than one device.
    """
    if devices < 1:
        raise UserError(f"a search needs at least 1 GPU, not {devices}")
    node = case.machine.devices_per_node
    if devices > node and devices % node:
        raise UserError(
            f"a search over several nodes of {case.machine.name} needs a multiple of {node} GPUs, not {devices:,}"
        )
    found = []
    for count in _trainer_counts(case, devices):
        colocated = count == devices
        trainer = _best_trainer(case, count)
        if trainer is None:
            continue
        for unfinished in dict.fromkeys(_settings(case, mode)["unfinished"] for mode in modes):
            engines = _best_engines(
                trainer.case, unfinished, colocated, count if colocated else devices - count
            )
            for mode in modes:
                if engines and _settings(case, mode)["unfinished"] == unfinished:
                    found.append(_join(trainer, engines, _settings(case, mode)))
    fitting = [result for result in found if result is not None]
    return sorted(fitting, key=lambda result: -result.iteration.rate.value)


def nearest_fit(case: Case) -> dict[str, Any] | None:
    """The fewest changes of trainer settings, by dotted key, that make the trainer fit on the same GPUs.

    The fastest of those with as few changes; None if nothing fits.
    """
    fitting = list(_trainers(case, case.trainer_devices, (case.config.batch.max_tokens_per_micro_batch,)))
    if not fitting:
        return None
    best = min(fitting, key=lambda trainer: (len(changes(case, trainer.case)), trainer.seconds))
    return changes(case, best.case)


def changes(before: Case, after: Case) -> dict[str, Any]:
    """Settings that differ, by dotted key, with the value after."""
    return {
        f"{section}.{name}": value
        for section in ("model", "parallel", "batch", "rollout")
        for name, value in vars(getattr(after.config, section)).items()
        if value != getattr(getattr(before.config, section), name)
    }


def _trainer_counts(case: Case, devices: int) -> list[int]:
    """Numbers of trainer GPUs: complete nodes, or single GPUs on one node; all of them for colocated engines."""
    node = case.machine.devices_per_node
    unit = 1 if devices <= node else node
    counts = range(unit, devices + 1, unit)
    step = -(-len(counts) // SPLITS)
    return sorted({*counts[::-step], devices})


def _best_trainer(case: Case, devices: int) -> _Trainer | None:
    """The layout that needs least memory of those that are about as fast as the fastest."""
    found = list(_trainers(case, devices))
    fastest = min((trainer.seconds for trainer in found), default=0.0)
    near = [trainer for trainer in found if trainer.seconds <= (1 + ABOUT) * fastest]
    return min(near, key=lambda trainer: trainer.memory.total.value, default=None)


def _trainers(case: Case, devices: int, budgets: Sequence[int] = ()) -> Iterator[_Trainer]:
    """Every layout on so many GPUs that fits, with the least recomputation that does.

    Micro-batches hold one or two of the longest sequences, or have one of these `budgets` of tokens per rank.
    """
    longest = case.config.rollout.longest_sequence
    for parallel in _layouts(case, devices):
        context = parallel.context_parallel_size
        multiple = parallel.pack_multiple(case.config.model.token_multiple)
        one = -(-longest // multiple) * multiple // context
        for tokens in sorted({one, 2 * one, *budgets}):
            laid = case.changed(parallel=vars(parallel), batch={"max_tokens_per_micro_batch": tokens})
            yield from _least_recomputation(laid)


def _layouts(case: Case, devices: int) -> Iterator[ParallelConfig]:
    """Every layout on so many GPUs, whether or not it divides the model. Each expert is complete on its rank."""
    for tensor, context, pipeline, chunks in product(TENSOR, CONTEXT, PIPELINE, CHUNKS):
        data, rest = divmod(devices, tensor * context * pipeline)
        if rest or not data:
            continue
        for expert in EXPERT if case.architecture.experts else (1,):
            yield replace(
                case.config.parallel,
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                context_parallel_size=context,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=chunks,
                data_parallel_size=data,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
            )


def _least_recomputation(case: Case) -> Iterator[_Trainer]:
    for recompute in RECOMPUTE:
        tried = case.changed(model={"recompute": recompute})
        try:
            validate(tried.config, tried.architecture)
        except UserError:
            continue
        _, memory = fullest_stage(tried)
        if memory.total.value <= RECOMMENDED_SHARE * tried.machine.device_bytes:
            yield _Trainer(tried, memory, score_time(tried), update_time(tried))
            return


def _best_engines(case: Case, unfinished: str, colocated: bool, devices: int) -> _Engines | None:
    """The engines on so many GPUs that decode an iteration fastest, tensor parallelism within a node."""
    found = []
    for tensor in ENGINE_TENSOR:
        if devices % tensor or tensor > min(devices, case.machine.devices_per_node):
            continue
        laid = case.changed(
            rollout={
                "placement": "colocated" if colocated else "separate",
                "unfinished": unfinished,
                "num_engines": devices // tensor,
                "engine_tensor_parallel_size": tensor,
            },
        )
        if colocated:
            share = min(laid.config.rollout.gpu_memory_share, free_share(laid))
            if share <= 0:
                continue
            laid = laid.changed(rollout={"gpu_memory_share": share})
        longest = laid.config.rollout.longest_sequence
        if case.architecture.num_attention_heads % tensor or engine_memory(laid).cache_tokens.value < longest:
            continue
        found.append(laid)
    if not found:
        return None
    best = min(found, key=decoding_seconds)
    return _Engines(best, rollout_time(best), evaluation_time(best))


def _join(trainer: _Trainer, engines: _Engines, settings: dict[str, Any]) -> Found | None:
    """Trainer and engines as one run; None if the rules refuse it, as colocated engines of several ranks, or if it does not
    fit."""
    joined = trainer.case.changed(rollout={**vars(engines.case.config.rollout), **settings})
    try:
        validate(joined.config, joined.architecture)
    except UserError:
        return None
    memory = fullest_stage(joined)[1] if joined.colocated else trainer.memory
    if memory.total.value > RECOMMENDED_SHARE * joined.machine.device_bytes:
        return None
    phases = combine(
        joined,
        1.0,
        rollout=engines.rollout,
        score=trainer.score,
        update=trainer.update,
        sync=sync_time(joined),
        evaluation=engines.evaluation,
        save=save_time(joined),
    )
    return Found(joined, phases, memory)


def _settings(case: Case, mode: str) -> dict[str, Any]:
    """The settings of `rollout` for a mode: the configured ones, changed as far as the mode requires."""
    rollout = case.config.rollout
    unfinished = "continue" if mode == "fully_asynchronous" else rollout.unfinished
    least = {"synchronous": 0, "one_step_off": 1, "fully_asynchronous": 1}[mode]
    if unfinished == "continue" and mode != "fully_asynchronous":
        least += 1
    return {"mode": mode, "unfinished": unfinished, "max_staleness": max(rollout.max_staleness, least)}
