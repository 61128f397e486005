"""One iteration of a run: which phases follow each other and which run side by side, and what limits it.

    synchronous            rollout, then score, update, sync
    one_step_off           rollout beside score and update, then sync
    fully_asynchronous     rollout beside score, update and sync

Evaluations and checkpoints are divided by the iterations between them.
"""

from dataclasses import dataclass

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Breakdown, Estimate, latest, total
from megatron_fipo.plan.rollout import decode_engine, responses_time, rollout_time
from megatron_fipo.plan.time.trainer import score_time, update_time
from megatron_fipo.plan.time.transfers import save_time, sync_time
from megatron_fipo.plan.workload import Workload

PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Points of training at which an iteration is estimated for the time of the complete run."""


@dataclass(frozen=True)
class Iteration:
    """Seconds of one iteration, and what they give."""

    rollout: Breakdown
    score: Breakdown
    update: Breakdown
    sync: Estimate
    evaluation: Estimate
    """Of one evaluation, divided by `evaluation.every`."""
    save: Estimate
    """Of one checkpoint, divided by `checkpoint.every`."""
    total: Estimate
    generated_tokens: float
    """Response tokens that the engines make, of groups that are trained on or uninformative."""
    trained_tokens: float
    """Tokens of prompts and responses that are trained on."""
    devices: int
    trainer_idle: float
    """Share of the iteration in which the trainer's devices compute neither log-probs nor updates."""
    engine_idle: float
    """Share of the iteration in which the engines decode nothing."""
    staleness: float
    """Mean number of weight versions between a group's oldest token and its update."""
    binding: str
    """The phase and its part that the iteration waits for longest, such as "rollout: decode"."""

    @property
    def rate(self) -> Estimate:
        """Trained tokens per second and device: of the whole iteration and of all devices, engines included."""
        return self.total.per(self.trained_tokens / self.devices)

    @property
    def generated_rate(self) -> Estimate:
        """Generated tokens per second and device."""
        return self.total.per(self.generated_tokens / self.devices)


def iteration(case: Case, progress: float = 1.0) -> Iteration:
    """The iteration at this point of training: 0 is the start, 1 the end."""
    return combine(
        case,
        progress,
        rollout=rollout_time(case, progress),
        score=score_time(case, progress),
        update=update_time(case, progress),
        sync=sync_time(case),
        evaluation=evaluation_time(case, progress),
        save=save_time(case),
    )


def combine(
    case: Case,
    progress: float,
    *,
    rollout: Breakdown,
    score: Breakdown,
    update: Breakdown,
    sync: Estimate,
    evaluation: Estimate,
    save: Estimate,
) -> Iteration:
    """The iteration of phases that were estimated before; `evaluation` and `save` are of one event."""
    config, workload = case.config, case.workload(progress)
    evaluation, save = _per(evaluation, config.evaluation.every), _per(save, config.checkpoint.every)
    trained = score.total + update.total
    if config.rollout.mode == "synchronous":
        seconds = total([rollout.total, trained, sync, evaluation, save])
    elif config.rollout.mode == "one_step_off":
        seconds = total([latest(rollout.total, trained), sync, evaluation, save])
    else:
        seconds = latest(rollout.total + evaluation, total([trained, sync, evaluation, save]))
    return Iteration(
        rollout=rollout,
        score=score,
        update=update,
        sync=sync,
        evaluation=evaluation,
        save=save,
        total=seconds,
        generated_tokens=workload.sampled * workload.response.mean,
        trained_tokens=workload.trained_tokens,
        devices=case.devices,
        trainer_idle=1 - trained.value / seconds.value,
        engine_idle=1 - (rollout.total.value + evaluation.value) / seconds.value,
        staleness=_staleness(case, workload, seconds.value),
        binding=_binding(config.rollout.mode, rollout, score, update, sync),
    )


def evaluation_time(case: Case, progress: float = 1.0) -> Estimate:
    """Seconds of one evaluation: all samples of all sets as one batch on the engines."""
    return responses_time(case, case.workload(progress), sum(case.held_out_samples), tail=True).total


def run_time(case: Case, last: Iteration) -> Estimate:
    """Seconds of all iterations, of which `last` is that at the end: the trapezoidal rule over `PROGRESS`.

    Without failures, restarts and waiting for nodes.
    """
    if case.assumptions.response_start in (None, case.assumptions.response_end):
        return last.total.scaled(case.config.iterations)
    points = [*(iteration(case, progress).total for progress in PROGRESS[:-1]), last.total]
    weights = [0.5, *[1.0] * (len(points) - 2), 0.5]
    mean = total(
        point.scaled(weight / (len(points) - 1)) for point, weight in zip(points, weights, strict=True)
    )
    return mean.scaled(case.config.iterations)


def _per(event: Estimate, every: int) -> Estimate:
    """The share of an event in each iteration; 0 is once per run, which is left out."""
    return event.scaled(1 / every) if every else NOTHING


def _staleness(case: Case, workload: Workload, seconds: float) -> float:
    """0 in synchronous, 1 in one_step_off, by construction; with `continue` in addition the versions that pass while a
    response is made, and while its group waits for the batch, half an iteration on average."""
    rollout = case.config.rollout
    base = {"synchronous": 0.0, "one_step_off": 1.0, "fully_asynchronous": 1.5}[rollout.mode]
    if rollout.unfinished == "drop":
        return base
    decoding = decode_engine(case, workload, 1, tail=False)[0]
    latency = decoding.seconds * decoding.mean_running
    return min(base + latency / seconds, float(rollout.max_staleness))


def _binding(mode: str, rollout: Breakdown, score: Breakdown, update: Breakdown, sync: Estimate) -> str:
    """The largest part of the side that is waited for."""
    sides = {
        "rollout": rollout,
        "score": score,
        "update": update,
        "weight sync": Breakdown({"transfer": sync}),
    }
    if mode != "synchronous":
        trained = score.total.value + update.total.value
        slower = ("rollout",) if rollout.total.value >= trained else ("score", "update")
        sides = {name: sides[name] for name in slower}
    phase = max(sides, key=lambda name: sides[name].total.value)
    return f"{phase}: {sides[phase].largest}"
