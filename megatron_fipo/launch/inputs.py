"""Checks of a training run before its job waits for nodes, and again in the first step of the job."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.config import FILE_SOURCES, Config, EvaluationSet, TrainingSet, load_config, validate
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.launch.needs import Allocation, check_allocation
from megatron_fipo.tasks.row_files import row_files


def check_inputs(config: Config) -> None:
    """Raise UserError for a model folder that `train` would refuse, or a data file that does not exist.

    Reads what `open_model_folder` does, and no rows.
    """
    from megatron_fipo.checkpoint.model_folder import open_model_folder

    open_model_folder(config.model.path)
    data = config.data
    entries: list[TrainingSet | EvaluationSet] = [*data.sets.values(), *config.evaluation.sets.values()]
    sets = [(entry.path, entry.source or data.source) for entry in entries]
    if data.train_path is not None:
        sets.append((data.train_path, data.source))
    for path, source in sets:
        if source in FILE_SOURCES:
            row_files(Path(path), source)


def load_run(
    config_path: str, overrides: Sequence[str], allocation: Allocation, *, look_for_inputs: bool = True
) -> Config:
    """The settings of `train`. Raises UserError for a run that could not start in this allocation.

    The weights and the data may be absent without `look_for_inputs`.
    """
    config = load_config(config_path, list(overrides))
    validate(config, read_model_config(config.model.path)[1])
    if look_for_inputs:
        check_inputs(config)
    check_allocation(config, allocation)
    return config
