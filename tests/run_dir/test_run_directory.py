"""The run's folder: complete checkpoints or none, the right ones kept, and one run per folder."""

import errno
import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.checkpoint.manifest import check_files, read_manifest
from megatron_fipo.config import load_config
from megatron_fipo.environment import run_versions, source_commit
from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import run_directory
from megatron_fipo.run_dir.loop_state import LoopState, RolloutState
from megatron_fipo.run_dir.metrics_log import MetricsLog
from megatron_fipo.run_dir.retention import checkpoints_to_remove
from megatron_fipo.run_dir.run_directory import (
    RunDirectory,
)
from tests.run_dir.claimed_run import MODEL, claim, claimed, config, names, save, write_ranks


def test_a_checkpoint_holds_everything_and_becomes_the_latest(tmp_path):
    directory = claimed(tmp_path, "parallel.tensor_model_parallel_size=2")
    assert directory.latest() is None
    state = LoopState(12, 12, rollout=RolloutState({"position": 7, "waiting": [[0.1, None]]}))
    pending = directory.begin_save(state)
    assert directory.latest() is None
    assert not directory.has(12)
    target = directory.commit(pending, write_ranks(pending))
    assert directory.latest() == target == pending.target
    assert directory.has(12)
    assert directory.load_state(target) == state
    manifest = read_manifest(target)
    assert check_files(target, manifest.files) == []
    assert manifest.info["iteration"] == 12
    assert manifest.info["layout"]["tensor_model_parallel_size"] == 2
    assert {"megatron-fipo", "megatron-core", "torch"} <= manifest.info["versions"].keys()
    assert (target / "hf/config.json").read_bytes() == (MODEL / "config.json").read_bytes()
    assert (target / "hf/tokenizer.json").exists()
    assert not (target / "hf/model.safetensors").exists()
    assert load_config(target / "config.yaml", []) == config(
        tmp_path, "parallel.tensor_model_parallel_size=2"
    )
    assert os.readlink(directory.checkpoints / "latest") == "iteration_000012"


def test_a_checkpoint_records_versions_and_commit(tmp_path):
    versions = read_manifest(save(claimed(tmp_path), 1)).info["versions"]
    assert versions == run_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["commit"] == (source_commit() or "unknown")


def test_only_complete_checkpoints_are_visible_while_one_is_written(tmp_path):
    directory = claimed(tmp_path)
    older = save(directory, 5)
    pending = directory.begin_save(LoopState(iteration=6))
    write_ranks(pending)
    assert directory.latest() == older
    assert [name for name in names(directory) if not name.startswith(".")] == ["iteration_000005", "latest"]
    directory.abandon(pending)
    assert names(directory) == ["iteration_000005", "latest"]


@pytest.mark.parametrize(
    "step", ["copy_companions", "save_config", "write_manifest", "_refuse_incomplete", "sync"]
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_save_that_fails_anywhere_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, step, error
):
    directory = claimed(tmp_path)
    older = save(directory, 5)

    def fail(*_):
        raise error

    monkeypatch.setattr(run_directory, step, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        save(directory, 6)
    monkeypatch.undo()
    if step == "sync":  # the checkpoint was complete already
        assert directory.latest() == directory.checkpoints / "iteration_000006"
    else:
        assert names(directory) == ["iteration_000005", "latest"]
        assert directory.latest() == older
    assert check_files(older, read_manifest(older).files) == []


@pytest.mark.parametrize("wrong", ["missing", "unrecorded", "shorter"])
def test_a_checkpoint_is_given_up_when_the_disk_does_not_hold_what_the_ranks_wrote(
    tmp_path, wrong, monkeypatch
):
    monkeypatch.setattr(run_directory.manifest, "NODE_CACHE_S", 0.1)
    directory = claimed(tmp_path)
    pending = directory.begin_save(LoopState(iteration=3))
    files = write_ranks(pending)
    shard = pending.partial / "weights/__0_0.distcp"
    if wrong == "missing":
        shard.unlink()
    elif wrong == "unrecorded":
        shard.with_name("stray").write_text("x")
    else:
        shard.write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights/.* is not what the ranks wrote"):
        directory.commit(pending, files)
    assert names(directory) == []


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path):
    directory = claimed(tmp_path)
    older = save(directory, 5)
    torn = directory.begin_save(LoopState(iteration=6))
    (directory.checkpoints / ".iteration_000004.removing").mkdir()
    (directory.checkpoints / ".latest").symlink_to("iteration_000001")
    directory._lock.release()
    later = claimed(tmp_path)
    assert later.latest() == older
    assert names(later) == ["iteration_000005", "latest"]
    # A writer that outlived its run cannot write into the next save of the same iteration.
    assert later.begin_save(LoopState(iteration=6)).partial != torn.partial


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ((1, 0, 0), [12]),
        ((3, 0, 0), [8, 10, 12]),
        ((1, 1, 0), [6, 12]),
        ((1, 2, 0), [4, 6, 12]),
        ((1, 0, 4), [4, 8, 12]),
        ((2, 1, 5), [6, 10, 12]),
    ],
)
def test_retention(tmp_path, keep, left):
    last, best, every = keep
    settings = (
        f"checkpoint.keep_last={last}",
        f"checkpoint.keep_best={best}",
        f"checkpoint.keep_every={every}",
    )
    directory = claimed(tmp_path, *settings)
    accuracies = {2: 0.1, 4: 0.5, 6: 0.6, 8: None, 10: 0.4, 12: 0.2}
    log = MetricsLog(tmp_path)
    for iteration, accuracy in accuracies.items():
        if accuracy is not None:
            log.log("evaluation", iteration, {"evaluation/avg_at_k": accuracy})
        save(directory, iteration)
    assert names(directory) == [*(f"iteration_{iteration:06d}" for iteration in left), "latest"]
    assert directory.load_state(directory.latest()).iteration == 12


def test_the_best_checkpoint_may_be_evaluated_after_it_was_saved(tmp_path):
    """A checkpoint saved when its run was stopped is evaluated by the run that resumes from it, which saves
    no other.
    """
    directory = claimed(tmp_path, "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    save(directory, 3)
    directory._lock.release()
    later = claimed(tmp_path, "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    log = MetricsLog(tmp_path)
    for iteration, accuracy in ((3, 0.9), (4, 0.1), (5, 0.2)):
        log.log("evaluation", iteration, {"evaluation/avg_at_k": accuracy})
        log.log("iteration", iteration, {"reward/mean": 1.0})
        if not later.has(iteration):
            save(later, iteration)
    assert names(later) == ["iteration_000003", "iteration_000005", "latest"]


@given(
    st.dictionaries(st.integers(1, 60), st.none() | st.floats(0, 1) | st.just(float("nan")), min_size=1),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_retention_keeps_the_newest_and_exactly_what_was_asked_for(checkpoints, last, best, every):
    removed = checkpoints_to_remove(list(checkpoints.items()), last, best, every)
    stay = sorted(checkpoints.keys() - set(removed))
    assert max(checkpoints) in stay
    assert sorted(checkpoints)[-max(last, 1) :] == stay[-max(last, 1) :]
    assert not every or all(iteration % every for iteration in removed)
    measured = sorted(value for value in checkpoints.values() if value is not None and value == value)
    kept = sorted(checkpoints[iteration] for iteration in stay if checkpoints[iteration] in measured)
    assert best == 0 or kept[-best:] == measured[-best:]
    assert len(stay) <= max(last, 1) + best + (
        sum(iteration % every == 0 for iteration in checkpoints) if every else 0
    )


def test_the_previous_checkpoint_is_the_newest_complete_older_one(tmp_path):
    directory = claimed(tmp_path, "checkpoint.keep_last=9")
    saved = [save(directory, iteration) for iteration in (999_999, 1_000_000, 1_000_001)]
    assert directory.latest() == saved[2]
    assert directory.previous(saved[2]) == saved[1]
    (saved[1] / "manifest.json").unlink()
    assert directory.previous(saved[2]) == saved[0]
    assert directory.previous(saved[0]) is None


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = claimed(tmp_path)
    with pytest.raises(UserError, match="another process"):
        claim(RunDirectory(tmp_path), config(tmp_path))
    assert first.path == tmp_path


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        claim(RunDirectory(tmp_path / "file"), config(tmp_path))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="has other files than those of a run"):
        claim(RunDirectory(tmp_path), config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("step", ["write", "mkdir"])
def test_a_first_start_on_a_full_disk_can_be_repeated(tmp_path, monkeypatch, step):
    """If there is no space for the settings, or for the folder made after them, and for what a process killed
    there left.
    """
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_, **__):
        raise full

    directory, mkdir = RunDirectory(tmp_path), Path.mkdir
    if step == "write":
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # killed: its temporary file stays
    else:
        monkeypatch.setattr(
            Path,
            "mkdir",
            lambda path, *args, **kwargs: (fail if path.name == "checkpoints" else mkdir)(
                path, *args, **kwargs
            ),
        )
    with pytest.raises(UserError, match="No space left"):
        claim(directory, config(tmp_path))
    monkeypatch.undo()
    assert list(tmp_path.glob("config.yaml*"))
    directory._lock.release()
    assert claimed(tmp_path).latest() is None


def test_an_empty_folder_for_checkpoints_is_in_nobody_s_way_and_one_with_files_is(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    claimed(tmp_path)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints/weights.bin").write_text("precious")
    with pytest.raises(UserError, match="has other files than those of a run"):
        claim(RunDirectory(other), config(other))


def test_a_model_folder_that_vanished_costs_the_checkpoint_and_not_the_older_one(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    directory = RunDirectory(tmp_path / "run")
    claim(directory, load_config(None, [f"model.path={model}", f"run_dir={tmp_path / 'run'}"]))
    save(directory, 1)
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"model folder .*model is gone or has no config\.json"):
        save(directory, 2)
    assert names(directory) == ["iteration_000001", "latest"]


def test_saving_comes_after_claiming(tmp_path):
    with pytest.raises(RuntimeError, match="claim"):
        RunDirectory(tmp_path).begin_save(LoopState())


def test_loop_state_survives_json_exactly(tmp_path):
    directory = claimed(tmp_path)
    state = LoopState(1, 1, rollout=RolloutState({"log_probs": [-0.1, -1e-30, 1 / 3]}))
    pending = directory.begin_save(state)
    assert json.loads((pending.partial / "loop.json").read_text())["rollout"]["log_probs"][2] == 1 / 3
    assert directory.load_state(directory.commit(pending, write_ranks(pending))) == state


@pytest.mark.parametrize("name", ["latest", "iteration_000001"])
def test_a_checkpoint_is_no_run_directory(tmp_path, name):
    directory = claimed(tmp_path / "run")
    checkpoint = save(directory, 1)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    given = (tmp_path / "run/checkpoints" / name).resolve()
    with pytest.raises(UserError, match=rf"is a checkpoint; give the folder of its run, {tmp_path}/run,"):
        claim(RunDirectory(given), config(given))
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("others", [(), ("notes.txt",)])
def test_a_config_file_of_the_user_is_not_taken_for_a_runs(tmp_path, others):
    (tmp_path / "config.yaml").write_text("# mine\nseed: 1\n")
    for name in others:
        (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="has other files than those of a run; choose another folder"):
        claim(RunDirectory(tmp_path), config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "# mine\nseed: 1\n"
