"""Which folders `tools.future_kl` refuses before it builds a model, each with one sentence."""

from pathlib import Path

import pytest

from megatron_fipo.config import load_config, save_config
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import CONFIG_FILE
from tools.future_kl.run import for_one_rank, open_run


def run_of(folder: Path, example: str, *overrides: str) -> Path:
    save_config(load_config(f"examples/{example}.yaml", [*overrides]), folder / CONFIG_FILE)
    return folder


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config.yaml; give the folder of a run"):
        open_run(tmp_path)


def test_another_objective(tmp_path):
    with pytest.raises(UserError, match=r"objective.name=dapo has no FutureKL"):
        open_run(run_of(tmp_path, "countdown/dapo"))


def test_one_mini_step_per_iteration(tmp_path):
    with pytest.raises(UserError, match="one mini-step per iteration, in which FutureKL is zero"):
        open_run(run_of(tmp_path, "countdown/fipo", "batch.mini_batch_prompts=24"))


def test_no_dumps(tmp_path):
    with pytest.raises(UserError, match=r"contains no iteration_.*parquet"):
        open_run(run_of(tmp_path, "countdown/fipo"))


def test_settings_for_one_rank():
    one = load_config("examples/countdown/fipo.yaml", [])
    several = load_config(
        "examples/countdown/fipo.yaml", ["parallel.data_parallel_size=2", "parallel.context_parallel_size=2"]
    )
    assert for_one_rank(one).parallel == one.parallel
    assert for_one_rank(several) == for_one_rank(one)
