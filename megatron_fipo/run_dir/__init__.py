"""A run directory on disk: checkpoints, settings, metrics, samples."""

import os
from pathlib import Path

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in a run directory and in each of its checkpoints."""
LOGS = "logs"
"""Logs of the jobs that trained in a run directory, a folder per attempt. Not part of the run's state."""


def run_folder(run_dir: str) -> Path:
    """The absolute path of a run's folder without links; also of a link to itself, for which `Path.resolve` raises."""
    return Path(os.path.realpath(run_dir))
