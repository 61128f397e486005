"""The run's folder: complete checkpoints or none, and no run inside another run's folder."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.errors import UserError
from megatron_fipo.trainer.loop import learning_rate
from megatron_fipo.trainer.state import LoopState, RunDirectory


def config(run_dir: Path, **changes: object) -> Config:
    loaded = load_config(None, ["model.path=m", f"run_dir={run_dir}"])
    return replace(loaded, **changes)


def write(folder: Path) -> None:
    (folder / "shard").write_text("weights")


def test_the_newest_checkpoint_replaces_the_older(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim(config(tmp_path))
    assert directory.latest() is None
    directory.save(LoopState(iteration=5, weight_version=5), write)
    newest = directory.save(LoopState(iteration=12, weight_version=12, dataset={"epoch": 1}), write)
    assert directory.latest() == newest
    assert directory.load_state(newest) == LoopState(iteration=12, weight_version=12, dataset={"epoch": 1})
    assert [path.name for path in directory.checkpoints.iterdir()] == ["iteration_000012"]
    assert (newest / "weights/shard").read_text() == "weights"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), UserError("rank 3 has no room"), KeyboardInterrupt()]
)
def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_else(tmp_path, error):
    directory = RunDirectory(tmp_path)
    directory.claim(config(tmp_path))
    older = directory.save(LoopState(iteration=5), write)

    def fail(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        directory.save(LoopState(iteration=6), fail)
    assert directory.latest() == older
    assert list(directory.checkpoints.iterdir()) == [older]


def test_a_half_written_checkpoint_of_a_killed_run_is_invisible_and_replaced(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim(config(tmp_path))
    older = directory.save(LoopState(iteration=5), write)
    (directory.checkpoints / ".iteration_000006/weights").mkdir(parents=True)
    (directory.checkpoints / ".iteration_000006/weights/torn").write_text("x")
    assert directory.latest() == older
    newest = directory.save(LoopState(iteration=6), write)
    assert [path.name for path in (newest / "weights").iterdir()] == ["shard"]


def test_a_folder_belongs_to_its_settings(tmp_path):
    directory = RunDirectory(tmp_path)
    first = config(tmp_path)
    directory.claim(first)
    stored = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        directory.claim(replace(first, seed=2))
    assert (tmp_path / "config.yaml").read_bytes() == stored


def test_a_run_may_go_on_for_longer_and_on_other_ranks(tmp_path):
    directory = RunDirectory(tmp_path)
    first = config(tmp_path)
    directory.claim(first)
    directory.claim(replace(first, iterations=900, parallel=replace(first.parallel, tensor_model_parallel_size=2)))
    assert load_config(tmp_path / "config.yaml", []).iterations == 900


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        RunDirectory(tmp_path).claim(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_learning_rate_rises_over_the_warm_up_and_then_stays():
    assert [learning_rate(1.0, iteration, 4) for iteration in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(3e-4, 0, 0) == 3e-4
