"""Rewards that a user brings are tried before anything expensive starts.

On every node a scorer loads them, since a scorer may be started again on any, and scores a made-up response to a problem of
each set, within its limits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_fipo.config import Config
from megatron_fipo.driver.actor_logs import why_it_died
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster, is_lost
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.driver.scoring.pool import WORDING
from megatron_fipo.errors import UserError
from megatron_fipo.hooks import HookError
from megatron_fipo.scorer.protocol import (
    GRACE_S,
    START_TIMEOUT_S,
    Failure,
    FailureKind,
    FinishedResponse,
    ScoreRequest,
    ScorerSettings,
)
from megatron_fipo.tasks.rewards import needs_trial
from megatron_fipo.tasks.task import HeldOut, Problem

RESPONSE = "Answer: 42"
"""The made-up response."""


@dataclass(frozen=True)
class Trial:
    """A problem whose reward is tried."""

    source: str
    """The file of the problem, or the name of its set if that is generated."""
    request: ScoreRequest


def trials(
    config: Config, train: Sequence[Problem], held_out: HeldOut, response: Sequence[int]
) -> list[Trial]:
    """The first problem of each set and reward, of the rewards that need a trial. `response` has token ids."""
    data = config.data
    problems: dict[tuple[bool, str, str], Problem] = {}
    for problem in train:
        settings = data.sets.get(problem.task.set_name)
        path = settings.path if settings else data.train_path or data.source
        problems.setdefault((True, path, problem.task.reward), problem)
    for name, evaluated in held_out.items():
        path = config.evaluation.sets[name].path if name in config.evaluation.sets else name
        for problem in evaluated:
            problems.setdefault((False, path, problem.task.reward), problem)
    answer = FinishedResponse(np.array(response, np.int32), "stop")
    return [
        Trial(source, ScoreRequest(key, problem, (answer,)))
        for key, ((_, source, reward), problem) in enumerate(problems.items())
        if needs_trial(reward)
    ]


def rehearse(
    actor_class: type, settings: ScorerSettings, trials: Sequence[Trial], log: Callable[[str], None]
) -> None:
    """Try all rewards on all nodes; nothing if there are no trials.

    Raises `HookError` with the problem, its file, the node if there are several, and the traceback of the user's code.
    """
    if not trials:
        return
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    actors: Any = ray.remote(actor_class)
    scorers = {
        name if len(nodes) > 1 else "": actors.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(settings)
        for node, name in _named(nodes).items()
    }
    try:
        _all({name: scorer.ready.remote() for name, scorer in scorers.items()}, "", START_TIMEOUT_S)
        for trial in trials:
            calls = {name: scorer.score.remote(trial.request) for name, scorer in scorers.items()}
            where = f"{trial.source}: with the made-up response {RESPONSE!r} to problem {trial.request.problem.problem_id}, "
            _all(calls, where, trial.request.calls * settings.reward.timeout_s + GRACE_S)
    finally:
        if not is_lost():
            for scorer in scorers.values():
                ray.kill(scorer)
    tried = f"a made-up response to a problem of {len(trials)} set{'s' if len(trials) > 1 else ''}"
    log(f"scored {tried} by your own reward" + (f", on each of {len(nodes)} nodes" if len(nodes) > 1 else ""))


def _named(nodes: Mapping[str, str]) -> dict[str, str]:
    """Names of nodes by id; the id itself for nodes that share a name."""
    names = list(nodes.values())
    return {node: name if names.count(name) == 1 else node for node, name in nodes.items()}


def _all(calls: Mapping[str, Any], where: str, seconds: float) -> None:
    """Wait for a call on every node. Raises `HookError` for the first that fails or is late."""
    pending = {reference: node for node, reference in calls.items()}
    until = time.monotonic() + seconds
    while pending:
        for reference in wait_for_one(list(pending), max(0.0, until - time.monotonic())):
            _check(reference, pending.pop(reference), where)
        if pending and time.monotonic() >= until:
            raise _refusal(
                next(iter(pending.values())),
                f"{where}a scorer did not return within {seconds:g} s",
                WORDING.fix(FailureKind.HUNG),
            )


def _check(reference: Any, node: str, where: str) -> None:
    try:
        answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise _refusal(node, str(error.cause), _share(node), error.cause.trace) from None
        raise _refusal(
            node, f"{where}a scorer failed: {error.cause!r}", WORDING.fix(FailureKind.RAISED)
        ) from None
    except ray.exceptions.RayError as error:
        check_cluster(ERROR_DELAY_S)
        raise _refusal(
            node, f"{where}a scorer died: {why_it_died(error)}", WORDING.fix(FailureKind.DIED)
        ) from None
    if isinstance(answer, Failure):
        raise _refusal(node, f"{where}{answer.reason}", WORDING.fix(answer.kind), answer.trace)


def _share(node: str) -> str:
    return "put it on a file system that all nodes share, or install its package on each node" if node else ""


def _refusal(node: str, fault: str, fix: str, trace: str = "") -> HookError:
    on_node = f"on node {node}: " if node else ""
    return HookError(f"{on_node}{fault}" + (f"; {fix}" if fix else ""), trace)
