"""A run directory on disk: checkpoints, settings, metrics, samples."""

import os
from pathlib import Path

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in a run directory and in each of its checkpoints."""
LOGS = "logs"
"""Logs of the jobs that trained in a run directory, a folder per attempt. Not part of the run's state."""
EVALUATIONS = "evaluations"
"""Tables of the evaluations of a run, with a row per response."""


def evaluation_table(run_dir: Path, iteration: int) -> Path:
    """The table of the evaluation after this iteration, as JSON lines."""
    return run_dir / EVALUATIONS / f"iteration_{iteration:06d}.jsonl"


def run_folder(run_dir: str) -> Path:
    """The absolute path of a run's folder without links; also of a link to itself, for which `Path.resolve` raises."""
    return Path(os.path.realpath(run_dir))
