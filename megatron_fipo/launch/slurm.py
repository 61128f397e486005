"""`megatron-fipo launch slurm`: a training run as a Slurm job."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import load_config
from megatron_fipo.errors import UserError, writing
from megatron_fipo.launch.inputs import load_run
from megatron_fipo.launch.needs import Allocation
from megatron_fipo.launch.notice import check_limit, notice_s
from megatron_fipo.launch.script import Job, render
from megatron_fipo.launch.settings import LaunchSettings
from megatron_fipo.launch.submit import submit
from megatron_fipo.outputs import check_output_file
from megatron_fipo.run_dir import LOGS, run_folder
from megatron_fipo.run_dir.metrics_log import read_metrics

LISTS = ("mounts", "env", "sbatch_lines")


def load_settings(path: Path | None, given: Mapping[str, Any]) -> LaunchSettings:
    """Settings from a YAML file, replaced by those `given`; items of lists are added. Raises UserError.

    Without a container, the job runs in this process's virtual environment unless another is named.
    """
    overrides = [f"{name}={value}" for name, value in given.items() if name not in LISTS]
    settings = load_config(path, overrides, LaunchSettings)
    items = {name: (*getattr(settings, name), *given[name]) for name in LISTS if name in given}
    try:
        settings = replace(settings, **items)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from None
    if settings.container is None and settings.venv is None and sys.prefix != sys.base_prefix:
        return replace(settings, venv=sys.prefix)
    return settings


def make_script(
    config_path: str,
    overrides: Sequence[str],
    options: Sequence[str],
    settings: LaunchSettings,
    *,
    dry_run: bool = False,
) -> tuple[str, Path]:
    """The batch script of a training run, and its folder of logs. Raises UserError for a run that could not start.

    `options` are those of `train`, such as --allow-change. The weights and the data are not looked for if `dry_run`,
    and not for a container, whose first step does so.
    """
    allocation = Allocation(settings.nodes, settings.gpus_per_node, settings.cpus_per_node)
    look = not dry_run and settings.container is None
    config = load_run(config_path, overrides, allocation, look_for_inputs=look)
    logs = run_folder(config.run_dir) / LOGS
    notice = settings.signal_notice_s or notice_s(read_metrics(logs.parent))
    check_limit(settings.time, notice)
    job = Job(
        "train", (config_path, *overrides, *options), f"{str(logs).replace('%', '%%')}/slurm-%j.log", notice
    )
    return render(job, settings), logs


def launch(script: str, logs: Path) -> str:
    """Submit exactly this script; returns the job id. Raises UserError."""
    check_output_file(logs / "slurm.log", "run_dir")
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    return submit(script)
