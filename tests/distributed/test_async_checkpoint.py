"""Saving in the background: what is written is the state at the start, and a writer that fails or dies fails the save on every rank.

The writers are real forked processes. Tests slow them down or break them by replacing, on a rank, a function that they run.
"""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_fipo.checkpoint import distributed
from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.rank_errors import raise_on_all_ranks
from megatron_fipo.errors import LostError, UserError
from tests.distributed.test_distributed_checkpoint import (
    forked_managers,  # noqa: F401 (a fixture)
    model,  # noqa: F401 (a fixture)
    new_policy,
    optimizer_state,
    train,
)
from tests.distributed.test_policy_grid import LAYOUTS, exported
from tests.ranks import run_ranks

WRITE = distributed._write


def write_slowly(*arguments):
    time.sleep(1.0)
    WRITE(*arguments)


def never_return(*arguments, **keywords):
    time.sleep(300.0)


def write_without_room(*arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    WRITE(*arguments)


def attempt(action, *arguments, **keywords) -> str:
    try:
        action(*arguments, **keywords)
    except UserError as error:
        return str(error)
    return "no error"


def save_twice_while_training(rank, world_size, folder, targets):
    """Weights and optimizer at the start of each of two saves; training continues while they are written."""
    policy, shards = new_policy(folder, LAYOUTS["dp2"])
    distributed._write = write_slowly
    writer, states = CheckpointWriter(), []
    assert writer.finished(blocking=False)
    for target in targets:
        train(policy, shards, 1)
        states.append((exported(policy), optimizer_state(policy)))
        writer.start(policy.modules, policy.optimizer, target, asynchronous=True)
        train(policy, shards, 1)
        assert not writer.finished(blocking=False)
        assert not (target / "metadata.json").exists()
        with pytest.raises(RuntimeError, match="not finished"):
            writer.start(policy.modules, policy.optimizer, target, asynchronous=True)
        assert writer.finished(blocking=True)
        assert writer.finished(blocking=False)
    return states


def load_each(rank, world_size, folder, sources):
    policy, _ = new_policy(folder, LAYOUTS["dp2"])
    states = []
    for source in sources:
        load_checkpoint(policy.modules, policy.optimizer, source)
        states.append((exported(policy), optimizer_state(policy)))
    return states


def test_each_save_holds_the_state_at_its_start(model, tmp_path):  # noqa: F811
    targets = [tmp_path / "first", tmp_path / "second"]
    for target in targets:
        target.mkdir()
    written = run_ranks(2, save_twice_while_training, model, targets)
    loaded = run_ranks(2, load_each, model, targets)
    for rank in range(2):
        for (weights, state), (weights_found, state_found) in zip(written[rank], loaded[rank], strict=True):
            assert all(torch.equal(weights_found[name], tensor) for name, tensor in weights.items())
            assert all(torch.equal(*pair) for pair in zip(state, state_found, strict=True))
        first, second = (state for _, state in written[rank])
        assert all(not torch.equal(*pair) for pair in zip(first, second, strict=True) if pair[0].numel())


def save_once(rank, world_size, folder, layout, target):
    policy, _ = new_policy(folder, LAYOUTS[layout])
    CheckpointWriter().start(policy.modules, policy.optimizer, target, asynchronous=False)


@pytest.mark.parametrize("layout", ["dp2", "cp2"])
def test_replicas_share_the_writing(model, tmp_path, layout):  # noqa: F811
    run_ranks(2, save_once, model, layout, tmp_path)
    sizes = [sum(path.stat().st_size for path in tmp_path.glob(f"__{rank}_*.distcp")) for rank in range(2)]
    assert sum(sizes) > 100_000
    assert min(sizes) > 0.4 * sum(sizes)


def kill_writer(rank, world_size, folder, target, again):
    """Rank 1's writer is killed; then the same writer objects save once more."""
    policy, _ = new_policy(folder, LAYOUTS["tp2"])
    distributed._write = never_return if rank == 1 else WRITE
    writer = CheckpointWriter()
    writer.start(policy.modules, policy.optimizer, target, asynchronous=True)
    assert not writer.finished(blocking=False)
    if rank == 1:
        os.kill(writer._pending.process.pid, signal.SIGKILL)
    message = attempt(writer.finished, blocking=True)
    distributed._write = WRITE
    policy.modules[0].decoder.final_layernorm.weight.data.fill_(2.5)
    writer.start(policy.modules, policy.optimizer, again, asynchronous=False)
    load_checkpoint(policy.modules, policy.optimizer, again)
    return message, float(policy.modules[0].decoder.final_layernorm.weight.data.mean())


def report_a_problem(rank, world_size, folder, lost):
    try:
        raise_on_all_ranks(folder, {1: "its writer ended"} if rank == 1 else {}, lost and rank == 1)
    except UserError as error:
        return type(error), str(error)


@pytest.mark.parametrize(("lost", "kind"), [(True, LostError), (False, UserError)])
def test_a_killed_writer_is_a_loss_on_every_rank_and_one_that_failed_is_not(tmp_path, lost, kind):
    for found, message in run_ranks(2, report_a_problem, tmp_path, lost):
        assert found is kind
        assert ("fix this" in message) is not lost


def test_a_killed_writer_fails_the_save_on_every_rank_and_the_next_one_is_whole(model, tmp_path):  # noqa: F811
    target, again = tmp_path / "first", tmp_path / "second"
    target.mkdir()
    again.mkdir()
    for message, mean in run_ranks(2, kill_writer, model, target, again):
        assert message.startswith(f"cannot write the checkpoint {target}")
        assert "rank 1: its writer was killed by SIGKILL" in message
        assert "rank 0:" not in message
        assert "\n" not in message
        assert mean == 2.5
    assert not (target / "metadata.json").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_child_of_writer(rank, world_size, folder, target):
    policy, _ = new_policy(folder, LAYOUTS["tp2"])
    if rank == 1:
        filesystem_async._write_item = never_return
    writer = CheckpointWriter()
    writer.start(policy.modules, policy.optimizer, target, asynchronous=True)
    found: list[int] = []
    if rank == 1:
        deadline = time.monotonic() + 20.0
        while len(found) < 2 and time.monotonic() < deadline:
            found = children(writer._pending.process.pid)
            time.sleep(0.05)
        os.kill(found[0] if found else writer._pending.process.pid, signal.SIGKILL)
    return attempt(writer.finished, blocking=True), found


def test_a_killed_child_of_a_writer_fails_the_save_and_takes_the_others_along(model, tmp_path):  # noqa: F811
    (first, _), (second, found) = run_ranks(2, kill_child_of_writer, model, tmp_path)
    if not found:
        pytest.skip("this Megatron-Core writes in threads")
    for message in (first, second):
        assert "rank 1: its writer was killed by SIGKILL" in message
    assert len(found) == 2
    time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}/fd/0").exists() for pid in found)


def save_without_room(rank, world_size, folder, target, at_start):
    policy, _ = new_policy(folder, LAYOUTS["tp2"])
    if at_start:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
    elif rank == 1:
        distributed._write = write_without_room
    return attempt(CheckpointWriter().start, policy.modules, policy.optimizer, target, asynchronous=False)


@pytest.mark.parametrize(("at_start", "culprit"), [(True, 0), (False, 1)])
def test_a_full_disk_is_one_sentence_on_every_rank(model, tmp_path, at_start, culprit):  # noqa: F811
    messages = run_ranks(2, save_without_room, model, tmp_path, at_start)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"cannot write the checkpoint {tmp_path} (")
    assert f"rank {culprit}: " in messages[0]
    assert "\n" not in messages[0]
    assert not (tmp_path / "metadata.json").exists()


def save_to_nowhere(rank, world_size, folder, targets):
    policy, _ = new_policy(folder, LAYOUTS["tp2"])
    return attempt(
        CheckpointWriter().start, policy.modules, policy.optimizer, targets[rank], asynchronous=True
    )


def test_a_folder_that_one_rank_does_not_see_is_refused_on_every_rank(model, tmp_path):  # noqa: F811
    for message in run_ranks(2, save_to_nowhere, model, [tmp_path, tmp_path / "other_node"]):
        assert "rank 1: there is no such folder" in message
    assert not any(tmp_path.iterdir())
