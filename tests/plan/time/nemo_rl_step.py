"""A step of NeMo-RL from the planner's phase times (see `nemo_rl_rows` for the rows and what is added to the phases)."""

from dataclasses import dataclass

from megatron_fipo.plan.layout import mini_steps
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.rollout import decoded_blocks, shuffled_lengths, steady
from megatron_fipo.plan.time.engine import decode_step, prefill
from megatron_fipo.plan.time.layer import FUSED_RATE
from megatron_fipo.plan.time.optimizer import largest_shard
from megatron_fipo.plan.time.packs import Packs, mini_step_packs
from megatron_fipo.plan.time.trainer import score_time, update_time
from tests.plan.time.nemo_rl_rows import Row, cache_tokens, case_of

UNFUSED_BYTES = 8
LOGIT_BYTES = (14, 16)
REFIT = {"32B": 7.0, "30B-A3B": 12.0, "235B-A22B": 12.0, "Llama-3.1-8B": 5.0, "Llama-3.1-70B": 14.0}
"""Seconds from training to generation; of the 235B model not published."""
MAX_SEQUENCES = 1024


@dataclass(frozen=True)
class Step:
    """Predicted seconds of the phases."""

    update: float
    score: float
    rollout: float
    refit: float
    total: float


def predict(row: Row, machine: Machine) -> Step:
    update, score = _update(row, machine), _score(row, machine)
    rollout, refit = _rollout(row, machine), REFIT[row.model]
    train = update + score + refit
    return Step(update, score, rollout, refit, rollout + train if row.mode == "sync" else max(rollout, train))


def _update(row: Row, machine: Machine) -> float:
    case = case_of(row, machine)
    packs, shard = mini_step_packs(case), largest_shard(case)
    extra = (shard.dense + shard.experts) * UNFUSED_BYTES + _logits(row, packs) * sum(LOGIT_BYTES)
    return _filled(row, packs) * update_time(case).total.value + (
        mini_steps(case.config) * packs.count * extra / machine.memory.value / FUSED_RATE
    )


def _score(row: Row, machine: Machine) -> float:
    case = case_of(row, machine, row.log_prob_packs)
    packs = mini_step_packs(case)
    extra = mini_steps(case.config) * packs.count * row.passes * _logits(row, packs) * LOGIT_BYTES[0]
    return (
        _filled(row, packs, row.log_prob_packs) * score_time(case).total.value
        + extra / machine.memory.value / FUSED_RATE
    )


def _logits(row: Row, packs: Packs) -> float:
    return packs.tokens * 151_936 / row.layout[0]


def _filled(row: Row, packs: Packs, size: int = 1) -> float:
    """What padding of every pack to its full length costs."""
    _, context, _, pipeline = row.layout
    return row.limit * size / context / packs.tokens if pipeline > 1 else 1.0


def _rollout(row: Row, machine: Machine) -> float:
    case = case_of(row, machine)
    workload, engines = case.workload(), case.config.rollout.num_engines
    responses, cache = -(-workload.sampled // engines), int(cache_tokens(case))

    def step(running: float, held: float) -> float:
        return decode_step(case, running, held).value

    if row.mode == "8-off":
        decoding = steady(workload, responses, min(MAX_SEQUENCES, 8 * responses), cache, step)
    else:
        lengths = shuffled_lengths(workload, responses)
        decoding = decoded_blocks(lengths, workload.prompt_tokens, MAX_SEQUENCES, cache).timed(step)
    return decoding.seconds + prefill(case, responses * workload.prompt_tokens).value
