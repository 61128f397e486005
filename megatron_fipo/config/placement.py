"""Whether rollout engines share the GPUs of trainer ranks: the rules of `rollout.placement`, and what `auto` means.

`with_placement` is applied once, when the number of GPUs is known. Everything after it reads `RolloutConfig.colocated`.
Pure: the number of GPUs is an argument.
"""

from dataclasses import replace

from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError

ENGINES = ("vllm", "local")
"""Values of `rollout.engine` that can share a GPU with a trainer rank: engines that free its memory in `sleep`."""


def with_placement(config: Config, gpus: int) -> Config:
    """`config` with a placement other than `auto`, for a run that has so many GPUs in all; 0 for ranks on CPUs."""
    if config.rollout.placement != "auto":
        return config
    shares = gpus and _too_few(config, gpus) and sharing_obstacle(config) is None
    return replace(config, rollout=replace(config.rollout, placement="colocated" if shares else "separate"))


def placement_note(config: Config, gpus: int) -> str | None:
    """The sentence that reports what `auto` became; None if nothing was chosen: another placement was given, or without GPUs."""
    if config.rollout.placement != "auto" or not gpus:
        return None
    needed = f"of {_count(gpus, 'GPU')} the ranks need {config.parallel.world_size:,} and the engines {engine_gpus(config):,}"
    if with_placement(config, gpus).rollout.colocated:
        return f"rollout.placement=auto is colocated: {needed}, so engines share the GPUs of ranks and sleep during updates"
    return f"rollout.placement=auto is separate: {needed}"


def check_placement(config: Config) -> None:
    """Refuse `colocated` for engines that cannot share the GPUs of the ranks. UserError."""
    if config.rollout.placement == "colocated" and (obstacle := sharing_obstacle(config)):
        raise UserError(f"rollout.placement=colocated {obstacle}")


def sharing_obstacle(config: Config) -> str | None:
    """Why engines cannot share the GPUs of the ranks, with the fix, as the end of a sentence; None if they can."""
    rollout, ranks = config.rollout, config.parallel.world_size
    if rollout.engine not in ENGINES:
        return f"needs rollout.engine={' or '.join(ENGINES)}, not {rollout.engine}"
    if rollout.mode != "synchronous":
        return f"needs rollout.mode=synchronous, not {rollout.mode}: engines sleep during updates"
    if rollout.engine_tensor_parallel_size > 1 or rollout.num_engines > ranks:
        return (
            f"puts each engine on the GPU of one of the {ranks} trainer ranks, so rollout.num_engines={rollout.num_engines} of "
            f"rollout.engine_tensor_parallel_size={rollout.engine_tensor_parallel_size} do not fit; lower them or choose separate"
        )
    return None


def engine_gpus(config: Config) -> int:
    """GPUs that the engines take, of their own or of ranks."""
    return config.rollout.num_engines * config.rollout.engine_tensor_parallel_size


def _too_few(config: Config, gpus: int) -> bool:
    """Whether the GPUs are enough for the ranks, but not also for engines of their own."""
    ranks = config.parallel.world_size
    return ranks <= gpus < ranks + engine_gpus(config)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"
