"""The folder of a study with synthetic runs: metrics, tables of evaluations, checkpoints with versions, outcomes."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_fipo.checkpoint.manifest import write_manifest
from megatron_fipo.config import save_config
from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.study.outcome import Outcome, StudyFolder
from megatron_fipo.study.schema import Arm, StudyConfig, Task
from tests.report.synthetic_run import write_synthetic_run

VERSIONS = {"megatron-fipo": "0.2.0", "torch": "2.13.0", "commit": "0123456789ab"}
PROBLEMS = 40


def write_run(
    run_dir: Path,
    objective: str,
    seed: int,
    *,
    iterations: int = 20,
    versions: Mapping[str, str] = VERSIONS,
    lr: float = 3e-4,
    gain: float = 0.0,
) -> Path:
    """A complete run. Held-out problems belong to the seed; `gain` is added to the chance of each to be solved."""
    write_synthetic_run(run_dir, objective, iterations, seed, lr=lr)
    difficulty, draw = random.Random(f"problems {seed}"), random.Random(f"{objective} {seed}")
    for iteration in range(0, iterations + 1, 5):
        table = evaluation_table(run_dir, iteration)
        table.parent.mkdir(exist_ok=True)
        rows = []
        for number in range(PROBLEMS):
            chance = difficulty.random() + gain
            rows += [
                {
                    "set": "countdown",
                    "problem_id": f"{number}",
                    "prompt": f"seed {seed}",
                    "ground_truth": "7",
                    "accuracy": float(draw.random() < chance),
                    "length": draw.randint(20, 90),
                    "response": f"iteration {iteration}, problem {number}, response {k}",
                }
                for k in range(4)
            ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = run_dir / f"checkpoints/iteration_{iterations:06d}"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {}, {"iteration": iterations, "versions": dict(versions)})
    return run_dir


def write_study(
    path: Path,
    arms: Sequence[str] = ("fipo", "dapo", "grpo"),
    seeds: Sequence[int] = (1, 2, 3),
    *,
    gains: Mapping[str, float] | None = None,
    versions: Mapping[str, Mapping[str, str]] | None = None,
) -> StudyFolder:
    """A complete study of these objectives; `versions` are those of single runs, by name."""
    folder = StudyFolder(path)
    for arm in arms:
        for seed in seeds:
            name = f"countdown-{arm}-seed{seed}"
            write_run(
                folder.run_dir(name),
                arm,
                seed,
                versions=(versions or {}).get(name, VERSIONS),
                gain=(gains or {}).get(arm, 0.0),
            )
            folder.save_outcome(name, Outcome("complete"))
    study = StudyConfig(
        name="Three objectives",
        output_dir=str(path),
        tasks={"countdown": Task("examples/countdown/fipo.yaml")},
        arms={arm: Arm(overrides=(f"objective.name={arm}",)) for arm in arms},
        seeds=tuple(seeds),
    )
    save_config(study, folder.settings)
    return folder
