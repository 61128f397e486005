"""What an iteration cost: tokens per second, MFU, waits, memory. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.config import Config
from megatron_fipo.driver.rollout.engine_usage import RolloutUsage, usage_values
from megatron_fipo.families.flops import ModelFlops
from megatron_fipo.trainer.protocol import RankCosts

GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """GPUs of a run; without GPUs, its ranks and engines."""

    ranks: int
    """Of the trainer."""
    engines: int
    """Of all engines."""
    total: int


def devices_of(config: Config, live: bool) -> Devices:
    """Without engines unless `live`. Colocated engines use the trainer's GPUs."""
    rollout, ranks = config.rollout, config.parallel.world_size
    engines = rollout.num_engines * rollout.engine_tensor_parallel_size if live else 0
    return Devices(ranks, engines, ranks if rollout.colocated else ranks + engines)


@dataclass(frozen=True)
class Capacity:
    """What the work of every iteration is compared with."""

    devices: Devices
    flops: ModelFlops
    forward_passes: int
    """Over each sequence for its log-probs: old policy, and reference policy if there is one."""
    peak_flops: float | None
    """Of all ranks together; None if not known."""


@dataclass(frozen=True)
class Work:
    """What an iteration computed."""

    lengths: list[int]
    """Prompt and response tokens of each trajectory trained on."""
    rows: int
    """Response tokens trained on."""

    @property
    def tokens(self) -> int:
        """Prompt and response tokens trained on."""
        return sum(self.lengths)


def work_of(trained: Sequence[Trajectory]) -> Work:
    """The work of an iteration that trains on these responses."""
    lengths = [trajectory.length for trajectory in trained]
    return Work(lengths, sum(trajectory.sampled_tokens for trajectory in trained))


def cost_values(
    capacity: Capacity,
    work: Work,
    seconds: Mapping[str, float],
    ranks: Sequence[RankCosts],
    rollout: RolloutUsage,
    *,
    sampled_during_update: bool,
) -> dict[str, float]:
    """All metrics of an iteration's cost. `seconds` as `PhaseClock.take` gives them."""
    return {
        **{f"time/{phase}": duration for phase, duration in seconds.items()},
        **throughput_values(work, rollout.generated_tokens, capacity.devices, seconds, sampled_during_update),
        **mfu_values(work, capacity, seconds),
        **rank_values(ranks),
        **usage_values(rollout.engines),
        "overhead/scoring": rollout.scoring_s,
    }


def throughput_values(
    work: Work,
    generated_tokens: int,
    devices: Devices,
    seconds: Mapping[str, float],
    sampled_during_update: bool,
) -> dict[str, float]:
    """Tokens per second and device, of the iteration and of its two sides; and the wait of the trainer.

    Without tokens from the engines their rate is absent: they had nothing to sample, as in a replay and at the end of
    `one_step_off`. Engines may sample while the driver waits for groups and, with `sampled_during_update`, while the ranks work.
    """
    training = seconds["old_log_probs"] + seconds["update"]
    waiting = seconds["rollout"] + seconds["rollout_wait"]
    sampling = waiting + (seconds["handover"] + training if sampled_during_update else 0.0)
    values = {
        "throughput/tokens_per_s_per_gpu": _rate(work.tokens, seconds["total"] * devices.total),
        "throughput/train_tokens_per_s_per_gpu": _rate(work.tokens, training * devices.ranks),
        "wait/trainer": _rate(waiting, seconds["total"]),
    }
    if generated_tokens:
        values["throughput/rollout_tokens_per_s_per_gpu"] = _rate(
            generated_tokens, sampling * devices.engines
        )
    return values


def mfu_values(work: Work, capacity: Capacity, seconds: Mapping[str, float]) -> dict[str, float]:
    """Model FLOPs utilization of the log-prob passes and of the update (forward and backward).

    Nothing is reported if the ranks' peak is not known.
    """
    peak = capacity.peak_flops
    if peak is None:
        return {}
    forward = capacity.flops.forward(work.lengths, work.rows)
    return {
        "mfu/old_log_probs": _rate(capacity.forward_passes * forward, seconds["old_log_probs"] * peak),
        "mfu/update": _rate(3 * forward, seconds["update"] * peak),
    }


def rank_values(costs: Sequence[RankCosts]) -> dict[str, float]:
    """The largest of each cost over the ranks, and for memory the rank that has it (the first of equals); the smallest budget."""
    values = {
        "overhead/unpickle": max(cost.unpickle_s for cost in costs),
        "overhead/shards": max(cost.shards_s for cost in costs),
    }
    for name, amounts in (
        ("device", [cost.device_bytes for cost in costs]),
        ("reserved", [cost.reserved_bytes for cost in costs]),
        ("host", [cost.host_bytes for cost in costs]),
    ):
        known = [amount for amount in amounts if amount is not None]
        if known:
            values[f"memory/{name}_gib"] = max(known) / GIB
            values[f"memory/{name}_rank"] = float(amounts.index(max(known)))
    budgets = [cost.logits_bytes for cost in costs if cost.logits_bytes is not None]
    if budgets:
        values["memory/logits_gib"] = min(budgets) / GIB
    return values


def _rate(amount: float, per: float) -> float:
    """0 if no time passed."""
    return amount / per if per > 0 else 0.0
