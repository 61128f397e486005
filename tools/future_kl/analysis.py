"""From the mini-steps of some iterations to the numbers of the result, as JSON values. Pure, deterministic."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_fipo.objective.config import ObjectiveConfig
from tools.future_kl.correlation import correlations
from tools.future_kl.mismatch import correction_effect, shift
from tools.future_kl.noise import SIGMAS, noise_floor
from tools.future_kl.samplers import ENGINE
from tools.future_kl.spread import by_distance, spread
from tools.future_kl.tokens import MiniStep, pooled, tokens_of

Row = dict[str, Any]


def analyse(steps: Sequence[MiniStep], objective: ObjectiveConfig, seed: int) -> dict[str, Any]:
    """All sections. Their rows name a `scope`: `mini-step k` of all iterations, or all mini-steps but the first (`later_scope`)."""
    tokens = {id(step): tokens_of(step, objective) for step in steps}
    sigmas = (_engine_sigma(steps), *SIGMAS)
    sections: dict[str, list[Row]] = {
        name: [] for name in ("spread", "distance", "correlations", "noise", "samplers")
    }
    for scope, members in scopes(steps).items():
        found = pooled([tokens[id(step)] for step in members])
        sections["spread"].append({"scope": scope, **asdict(spread(found, objective.influence_bounds))})
        sections["distance"] += [{"scope": scope, **asdict(row)} for row in by_distance(found)]
        sections["correlations"] += [{"scope": scope, **asdict(row)} for row in correlations(found, seed)]
        floor = noise_floor(members, found, sigmas, objective, seed)
        sections["noise"].append({"scope": scope, **asdict(floor)})
        sections["samplers"] += [{"scope": scope, **row} for row in _sampler_rows(members, objective)]
    for iteration in sorted({step.iteration for step in steps}):
        members = [step for step in steps if step.iteration == iteration and step.number > 1]
        found = pooled([tokens[id(step)] for step in members])
        row = asdict(spread(found, objective.influence_bounds))
        sections["spread"].append({"scope": f"iteration {iteration}, {later_scope(members)}", **row})
    return {"later_scope": later_scope(steps), "sigma_of_engine": sigmas[0], **sections}


def scopes(steps: Sequence[MiniStep]) -> dict[str, list[MiniStep]]:
    """The mini-steps that are analysed together, by name."""
    numbers = sorted({step.number for step in steps})
    found = {f"mini-step {number}": [step for step in steps if step.number == number] for number in numbers}
    return found | {later_scope(steps): [step for step in steps if step.number > 1]}


def later_scope(steps: Sequence[MiniStep]) -> str:
    """The name of all mini-steps but the first."""
    return f"mini-steps 2 to {max(step.number for step in steps)}"


def _engine_sigma(steps: Sequence[MiniStep]) -> float:
    """Standard deviation of the rollout engine's log-probs around the trainer's."""
    differences = [(step.old_log_probs - step.samplers[ENGINE])[step.mask] for step in steps]
    return float(np.concatenate(differences).std())


def _sampler_rows(members: Sequence[MiniStep], objective: ObjectiveConfig) -> list[Row]:
    rows = []
    for name in dict.fromkeys(name for step in members for name in step.samplers):
        having = [step for step in members if name in step.samplers]
        others = [step.samplers[name] for step in having]
        rows.append(
            {
                "sampler": name,
                "iterations": sorted({step.iteration for step in having}),
                **asdict(shift(having, others, objective)),
                **asdict(correction_effect(having, others, objective)),
            }
        )
    return rows
