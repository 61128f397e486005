"""The run's folder: complete checkpoints or none, and no run inside another run's folder."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.errors import UserError
from megatron_fipo.trainer.loop import learning_rate
from megatron_fipo.trainer.metrics_log import MetricsLog
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
    directory.save(LoopState(iteration=1), write)
    stored = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        directory.claim(replace(first, seed=2))
    assert (tmp_path / "config.yaml").read_bytes() == stored


def test_a_run_that_never_got_anywhere_does_not_hold_its_folder(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.claim(config(tmp_path))
    directory.claim(config(tmp_path, seed=2))
    MetricsLog(tmp_path).log("iteration", 1, {"reward/mean": 0.5})
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        directory.claim(config(tmp_path, seed=3))


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = RunDirectory(tmp_path)
    first.claim(config(tmp_path))
    with pytest.raises(UserError, match="another process"):
        RunDirectory(tmp_path).claim(config(tmp_path))


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        RunDirectory(tmp_path / "file").claim(config(tmp_path))


def test_what_a_run_may_change(tmp_path):
    directory = RunDirectory(tmp_path)
    first = config(tmp_path)
    directory.claim(first)
    directory.save(LoopState(iteration=1), write)
    smaller = replace(first, batch=replace(first.batch, max_tokens_per_micro_batch=30000))
    directory.claim(smaller)
    by_micro_batch = replace(first, objective=replace(first.objective, normalization="reference_micro_batch"))
    with pytest.raises(UserError, match="max_tokens_per_micro_batch"):
        directory.claim(by_micro_batch)


def test_a_run_may_go_on_for_longer_and_on_other_ranks(tmp_path):
    directory = RunDirectory(tmp_path)
    first = config(tmp_path)
    directory.claim(first)
    directory.save(LoopState(iteration=1), write)
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
