"""Predicted against measured: calibrate this CPU, train for a few iterations, compare the phases."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.time.trainer import score_time, update_time
from megatron_fipo.plan.workload import Assumptions
from tests.calibrate.test_shapes import MODEL
from tests.calibrate.tiny import RECIPE

OVERRIDES = [
    f"model.path={MODEL}",
    "iterations=4",
    "evaluation.before_training=false",
    "evaluation.every=0",
    "data.evaluation_size=4",
    "checkpoint.every=0",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
]
PROMPT_TOKENS = 12.0
"""About the mean of the generated problems."""
FACTOR = 2.0
"""Another process on a core halves what the run gets of it, and calibration takes the processor's time."""


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.cli", *arguments],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def case_of(values: dict[str, float], config, machine) -> Case:
    """The iteration with the lengths that it had."""
    mean = values["length/mean"]
    spread = (
        math.log(values["length/q75"] / values["length/q25"]) / 1.349
    )  # of a normal, quartile to quartile
    assumptions = Assumptions(
        prompt_tokens=PROMPT_TOKENS,
        response_start=mean,
        response_end=mean,
        prompt_spread=0.0,
        response_spread=max(0.1, spread),
        informative=1.0,
    )
    return Case(config, *read_model_config(config.model.path), machine, assumptions)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_phases_take_about_as_long_as_predicted(tmp_path: Path):
    from megatron_fipo.plan.rollout import rollout_time

    overrides = [*OVERRIDES, f"run_dir={tmp_path / 'runs/real'}"]
    run("calibrate", str(RECIPE), "--output", str(tmp_path / "cpu.yaml"), *overrides)
    run("train", str(RECIPE), *overrides)
    config, machine = load_config(RECIPE, overrides), load_machine(str(tmp_path / "cpu.yaml"))
    records = map(json.loads, (tmp_path / "runs/real/metrics.jsonl").read_text().splitlines())
    iterations = [record["values"] for record in records if record["kind"] == "iteration"][1:]
    phases = {
        "time/update": update_time,
        "time/old_log_probs": score_time,
        "time/rollout": rollout_time,
    }
    ratios = {
        name: statistics.median(
            predict(case_of(values, config, machine)).total.value / values[name] for values in iterations
        )
        for name, predict in phases.items()
    }
    print(ratios)
    assert all(1 / FACTOR < ratio < FACTOR for ratio in ratios.values()), ratios
