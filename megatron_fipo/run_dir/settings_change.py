"""The settings that a run may change when it resumes, and the refusal of all other changes."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_fipo.config import Config, differences
from megatron_fipo.config.load import leaves
from megatron_fipo.errors import UserError

FREE_KEYS = (
    "run_dir",
    "iterations",
    "max_walltime_minutes",
    "ray_address",
    "deterministic",
    "checkpoint.",
    "evaluation.",
    "tracking.",
    "head.",
    "model.recompute",
    "model.layer_spec",
    "optimizer.cpu_offload",
    "rollout.num_engines",
    "rollout.engine_tensor_parallel_size",
    "rollout.placement",
    "rollout.gpu_memory_share",
    "rollout.max_retries",
    "rollout.timeout_s",
    "rollout.stall_timeout_s",
    "rollout.health_timeout_s",
    "rollout.max_restarts",
    "rollout.weight_bucket_mb",
    "rollout.check_weight_sync",
    "rollout.dump_every",
    "reward.scorers",
    "reward.timeout_s",
    "reward.memory_mb",
    "reward.max_failure_share",
)
"""The length of the run, and how its work is distributed, monitored and logged.

Any other change makes a different run.
"""
PACKING_KEYS = ("batch.max_tokens_per_micro_batch", "parallel.")
"""They decide which responses share a micro-batch. Also free, unless the normalization depends on that."""
SEED = "seed"
"""Another seed is refused always: the order of the training data follows from it."""
TRAINING_DATA = "data.train_path"
"""Other training problems are refused always: the position in the data and the waiting groups refer to them."""
IN_FLIGHT_KEY = "rollout.prompts_in_flight"
"""Also free with rollout.unfinished=drop, which trains on the same prompts regardless of how many are in
flight. With `continue` it decides the age of the responses that are trained on.
"""


def refuse_changes(
    owner: Path,
    stored: Config,
    config: Config,
    allow_change: Sequence[str],
    inputs: Mapping[str, str | None],
) -> list[str]:
    """Compare a run's settings with the stored ones of `owner`, its folder or its newest checkpoint.

    `inputs` has the changes of settings that name files and are compared by content (`input_changes`).
    Returns one line for each change that needs and has the permission of `allow_change`. Raises `UserError`
    that lists all other changes with both values.
    """
    before, after = dict(leaves(stored)), dict(leaves(config))
    free = (*_free_keys(stored, config), *inputs)
    lines = {
        key: f"{key} was {before[key]} and is {after[key]}"
        for key in differences(stored, config)
        if not key.startswith(free)
    }
    lines |= {key: change for key, change in inputs.items() if change is not None}
    fixed = {SEED} & lines.keys() | ({TRAINING_DATA} if inputs.get(TRAINING_DATA) else set())
    refused = [key for key in lines if key not in allow_change or key in fixed]
    if refused:
        changes = "; ".join(lines[key] for key in refused)
        advice = "restore them, or choose another run_dir"
        if not fixed:
            advice = (
                "restore them, choose another run_dir, or resume with the changed settings by "
                f"--allow-change {','.join(lines)}"
            )
        raise UserError(f"{owner} belongs to a run with other settings ({changes}): {advice}")
    return list(lines.values())


def _free_keys(stored: Config, config: Config) -> tuple[str, ...]:
    free: tuple[str, ...] = FREE_KEYS
    if stored.objective.normalization == config.objective.normalization == "token_mean":
        free += PACKING_KEYS
    if stored.rollout.unfinished == config.rollout.unfinished == "drop":
        free += (IN_FLIGHT_KEY,)
    return free


def refuse_unknown(allow_change: Sequence[str]) -> None:
    """Raise `UserError` if one of these is not the full name of a setting."""
    keys = [key for key, _ in leaves(Config)]
    for key in allow_change:
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise UserError(f"--allow-change {key}: there is no such setting; did you mean '{nearest}'?")
