"""The settings that a run may change when it resumes, and the refusal of all other changes."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, load_stored_config
from megatron_fipo.config.load import leaves
from megatron_fipo.config.vllm_arguments import sampling_arguments
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import CONFIG_FILE
from megatron_fipo.run_dir.inputs import RunInputs, input_changes, read_inputs, set_changes

FREE_KEYS = (
    "run_dir",
    "iterations",
    "max_walltime_minutes",
    "ray_address",
    "env",
    "placement_timeout_s",
    "deterministic",
    "checkpoint.",
    "recovery.",
    "evaluation.",
    "data.evaluation_size",
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
    "reward.http.",
    "environment.workers",
    "environment.timeout_s",
    "environment.memory_mb",
    "environment.max_failure_share",
)
"""The length of the run, and how its work is distributed, monitored and logged. A name that ends with a dot is all of a section.

Any other change makes a different run.
"""
PACKING_KEYS = ("batch.max_tokens_per_micro_batch", "parallel.")
"""They decide which responses share a micro-batch. Also free, unless the normalization depends on that."""
VLLM_KEY = "rollout.vllm"
"""Also free if only arguments change that decide how fast vLLM samples (`SPEED_ONLY`), and not what it samples."""
SEED = "seed"
"""Another seed is refused always: the order of the training data follows from it."""
ROUTER = "model.router.trainable"
"""Refused always too: a checkpoint has the optimizer's state of what was trained."""
TRAINING_SETS = "data.sets"
_DATA_PATH = re.compile(r"data\.train_path|data\.sets\.\w+\.path")
_SET_OR_WEIGHT = re.compile(r"data\.sets\.\w+(\.weight)?")
"""Other training problems, sets and weights are refused always: the position in the data and the waiting groups refer to them."""
IN_FLIGHT_KEY = "rollout.prompts_in_flight"
"""Also free with rollout.unfinished=drop, which trains on the same prompts regardless of how many are in
flight. With `continue` it decides the age of the responses that are trained on.
"""


def accepted_changes(
    owner: Path, config: Config, inputs: RunInputs, allow_change: Sequence[str]
) -> list[str]:
    """Compare a run with what `owner`, its folder or its newest checkpoint, recorded of settings and inputs.

    Returns the lines of `refuse_changes` and of `set_changes`. Raises `UserError` for any other change.
    """
    recorded, stored = read_inputs(owner), load_stored_config(owner / CONFIG_FILE)
    allowed = refuse_changes(owner, stored, config, allow_change, input_changes(recorded, inputs))
    return allowed + set_changes(recorded, inputs)


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
    before, after = _values(stored), _values(config)
    free = (*_free_keys(stored, config), *inputs)
    lines = {
        key: f"{key} was {before.get(key, 'absent')} and is {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not _is_among(key, free)
    }
    lines = {key: line for key, line in lines.items() if key.rpartition(".")[0] not in lines}
    lines |= {key: change for key, change in inputs.items() if change is not None}
    fixed = {
        key
        for key in lines
        if key in (SEED, ROUTER)
        or _SET_OR_WEIGHT.fullmatch(key)
        or (_DATA_PATH.fullmatch(key) and inputs.get(key))
    }
    refused = [key for key in lines if _setting(key) not in allow_change or key in fixed]
    if refused:
        changes = "; ".join(lines[key] for key in refused)
        advice = "restore them, or choose another run_dir"
        if not fixed:
            advice = (
                "restore them, choose another run_dir, or resume with the changed settings by "
                f"--allow-change {','.join(dict.fromkeys(map(_setting, lines)))}"
            )
        raise UserError(f"{owner} belongs to a run with other settings ({changes}): {advice}")
    return list(lines.values())


def _values(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key; of a training set a key for its name, and one for each of its settings."""
    values = dict(leaves(config))
    for name, entry in values.pop(TRAINING_SETS).items():
        key = f"{TRAINING_SETS}.{name}"
        values[key] = "present"
        values |= {f"{key}.{item.name}": getattr(entry, item.name) for item in fields(entry)}
    return values


def _setting(key: str) -> str:
    """The setting as `--allow-change` names it: all of `data.sets` is one."""
    return TRAINING_SETS if key.startswith(f"{TRAINING_SETS}.") else key


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    """Whether a setting is one of these names or in one of these sections; `env` is not a part of `environment.name`."""
    return key in names or any(name.endswith(".") and key.startswith(name) for name in names)


def _free_keys(stored: Config, config: Config) -> tuple[str, ...]:
    free: tuple[str, ...] = FREE_KEYS
    if not (stored.objective.depends_on_packing or config.objective.depends_on_packing):
        free += PACKING_KEYS
    if stored.rollout.unfinished == config.rollout.unfinished == "drop":
        free += (IN_FLIGHT_KEY,)
    if sampling_arguments(stored.rollout.vllm) == sampling_arguments(config.rollout.vllm):
        free += (VLLM_KEY,)
    return free


def refuse_unknown(allow_change: Sequence[str]) -> None:
    """Raise `UserError` if one of these is not the full name of a setting."""
    keys = [key for key, _ in leaves(Config)]
    for key in allow_change:
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise UserError(f"--allow-change {key}: there is no such setting; did you mean '{nearest}'?")
