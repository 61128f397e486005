"""The folder of a training run with synthetic but plausible numbers."""

import math
import random
from collections.abc import Callable
from pathlib import Path

from megatron_fipo.driver.evaluation_metrics import over_sets
from megatron_fipo.run_dir.metrics_log import MetricsLog, Sample, SampleLog

CONFIG = """\
model:
  path: examples/countdown/base
objective:
  name: {objective}
  half_life: 32.0
  influence_clip: [0.8, 1.2]
optimizer:
  lr: {lr}
run_dir: {run_dir}
iterations: {iterations}
seed: {seed}
"""


def write_synthetic_run(
    run_dir: Path,
    objective: str = "fipo",
    iterations: int = 30,
    seed: int = 1,
    every: int = 5,
    lr: float = 3e-4,
) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(
        CONFIG.format(objective=objective, run_dir=run_dir, iterations=iterations, seed=seed, lr=lr)
    )
    rng = random.Random(f"{objective}{seed}")
    metrics, samples = MetricsLog(run_dir), SampleLog(run_dir)
    metrics.log("evaluation", 0, _evaluation(0.0, rng))
    for iteration in range(1, iterations + 1):
        progress = 1 - math.exp(-5 * iteration / iterations)
        metrics.log("iteration", iteration, _iteration(iteration, progress, objective, rng))
        if iteration % every == 0:
            metrics.log("evaluation", iteration, _evaluation(progress, rng))
            for accuracy in (1.0, 0.0):
                samples.log(_sample(iteration, progress, accuracy, objective, rng))
    return run_dir


def _evaluation(progress: float, rng: random.Random) -> dict[str, float]:
    noise = rng.gauss(0, 0.012)
    mean = 29 + 33 * progress + rng.gauss(0, 1.5)
    names = {
        "avg_at_k": 0.27 + 0.25 * progress + noise,
        "cons_at_k": 0.38 + 0.21 * progress + noise,
        "pass_at_k": 0.64 + 0.12 * progress + noise,
        "k": 4,
        "problems": 150,
        "length_mean": mean,
        "length_q25": 0.55 * mean,
        "length_median": 0.88 * mean,
        "length_q75": 1.35 * mean,
        "truncated": 0.003 + 0.06 * progress**2,
        "failed": 0,
    }
    return over_sets({"countdown": names})


def _iteration(iteration: int, progress: float, objective: str, rng: random.Random) -> dict[str, float]:
    def about(value: float, relative: float = 0.08) -> float:
        return value * (1 + rng.gauss(0, relative))

    mean = about(30 + 33 * progress, 0.04)
    accuracy = 0.28 + 0.24 * progress + rng.gauss(0, 0.02)
    prompts = rng.randint(36, 60)
    values = {
        "reward/mean": 2 * accuracy - 1 - 0.05 * progress,
        "accuracy/mean": accuracy,
        "groups/used": 24.0,
        "groups/all_right": float(rng.randint(0, 3) + round(4 * progress)),
        "groups/all_wrong": float(rng.randint(3, 8)),
        "groups/surplus": float(rng.randint(0, 4)),
        "groups/failed": 0.0,
        "groups/unscored": 0.0,
        "groups/stale": float(rng.randint(0, 1)),
        "rollout/prompts": float(prompts),
        "rollout/unused_share": about(0.02),
        "tokens/generated": about(prompts * 16 * mean, 0.02),
        "tokens/used": 24 * 16 * mean,
        "tokens/filtered": about((prompts - 28) * 16 * mean, 0.02),
        "tokens/dropped": about(2 * 16 * mean, 0.02),
        "tokens/carried": about(2 * 16 * mean, 0.02),
        "staleness/mean": about(0.1),
        "staleness/max": 1.0,
        "staleness/tokens_age_0": 0.9,
        "staleness/tokens_age_1": 0.1,
        "staleness/tokens_older": 0.0,
        "rollout/truncated": about(0.004 + 0.07 * progress**2),
        "rollout/log_prob_difference": about(2e-4),
        "length/min": 12.0 + rng.randint(0, 3),
        "length/q25": 0.55 * mean,
        "length/mean": mean,
        "length/median": 0.88 * mean,
        "length/q75": 1.35 * mean,
        "length/max": 128.0,
        "advantage/length_weighted": -0.12 + 0.11 * progress + rng.gauss(0, 0.015),
        "policy/loss": rng.gauss(0, 0.02),
        "policy/kl": about(0.0016 + 0.0006 * progress, 0.2),
        "policy/entropy": about(1.02 - 0.25 * progress, 0.015),
        "policy/grad_norm": about(0.55, 0.15),
        "policy/clip_fraction_high": about(0.006, 0.2),
        "policy/clip_fraction_low": about(0.0023, 0.2),
        "policy/dual_clip_fraction": 0.0,
        "policy/dropped_sequences": 0.0,
        "policy/nonfinite_sequences": 0.0,
        "policy/sigma_log_ratio": 0.0,
        "policy/normalization_gap": about(0.03, 0.3),
        "learning_rate": 3e-4,
        "weights/version": float(iteration),
        **_cost(iteration, progress, about),
    }
    if objective == "fipo":
        values |= {
            "influence/mean": 1.004 + 0.003 * progress + rng.gauss(0, 0.001),
            "influence/min": 0.8,
            "influence/max": 1.2,
            "influence/share_at_low": about(0.07, 0.1),
            "influence/share_at_high": about(0.09, 0.1),
            "influence/raw_mean": about(1.05, 0.03),
        }
    return values


def _cost(iteration: int, progress: float, about: Callable[..., float]) -> dict[str, float]:
    """Phases, rates, waits, engines and memory of a run on two GPUs."""
    phases = {
        "rollout": about(1.0 + 2.0 * progress),
        "plan": about(0.05),
        "handover": about(0.2),
        "old_log_probs": about(0.7 + 0.4 * progress),
        "update": about(2.6 + 1.2 * progress),
        "rollout_wait": 0.0,
        "weight_sync": about(0.12),
        "evaluation": about(4.0) if iteration % 5 == 1 and iteration > 1 else 0.0,
        "checkpoint": about(0.3) if iteration % 10 == 1 and iteration > 1 else 0.0,
        "log": about(0.04),
        "other": about(0.01),
    }
    total = sum(phases.values())
    return {
        **{f"time/{name}": seconds for name, seconds in phases.items()},
        "time/total": total,
        "throughput/tokens_per_s_per_gpu": about(9000 / total),
        "throughput/rollout_tokens_per_s_per_gpu": about(16000 / phases["rollout"]),
        "throughput/train_tokens_per_s_per_gpu": about(18000 / phases["update"]),
        "mfu/old_log_probs": about(0.34),
        "mfu/update": about(0.41),
        "wait/trainer": phases["rollout"] / total,
        "engine_mean/idle": 1 - phases["rollout"] / total,
        "engine_mean/running": about(120.0),
        "engine_mean/waiting": about(3.0),
        "router/load_max": about(2.3),
        "router/load_min": about(0.1),
        "router/missing": about(0.05),
        "router/differing": about(0.04),
        "engine_mean/preemptions": about(1.0),
        "engine_mean/kv_use": about(0.7),
        "engine_mean/prefix_hits": about(0.4),
        "memory/device_gib": about(61.0, 0.01),
        "memory/reserved_gib": about(70.0, 0.01),
        "memory/host_gib": 11.0 + 0.01 * iteration,
        "overhead/put": about(0.03),
        "overhead/unpickle": about(0.02),
        "overhead/shards": about(0.05),
        "overhead/scoring": about(0.1),
        "overhead/dump": about(0.02),
    }


def _sample(iteration: int, progress: float, accuracy: float, objective: str, rng: random.Random) -> Sample:
    numbers = rng.sample(range(1, 10), 3)
    target = numbers[0] * numbers[1] + numbers[2]
    text = "".join(
        f"{a}{op}{b}{op2}{c}={rng.randint(1, 99)};"
        for op in "+-*"[: 1 + round(2 * progress)]
        for op2 in "+*"
        for a, b, c in (rng.sample(numbers, 3),)
    )
    text += f"{numbers[0]}*{numbers[1]}+{numbers[2]}={target};#{numbers[0]}*{numbers[1]}+{numbers[2]}"
    drift, weights = 0.0, []
    for _ in text:
        drift = 0.93 * drift + rng.gauss(0, 0.05)
        weights.append(min(max(1 + drift, 0.8), 1.2))
    return Sample(
        iteration,
        f"{numbers[0]},{numbers[1]},{numbers[2]}={target}:",
        list(text),
        weights if objective == "fipo" else None,
        2 * accuracy - 1,
        accuracy,
        0.9 if accuracy else -0.6,
        "stop",
    )
