"""What happens to a run's folder behind its back: each damage is refused with its reason, and nothing older is touched.

The checkpoints are real: two ranks train a small model and write weights, optimizer and random states.
"""

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked

from megatron_fipo.checkpoint.distributed import CheckpointWriter, load_checkpoint
from megatron_fipo.checkpoint.manifest import FileRecord, check_files, hash_files, read_manifest, write_manifest
from megatron_fipo.checkpoint.rng import load_rng, save_rng
from megatron_fipo.config import Config, load_config, save_config
from megatron_fipo.errors import UserError
from megatron_fipo.trainer.state import LoopState, PendingSave, RunDirectory
from tests.distributed.test_distributed_checkpoint import new_policy
from tests.distributed.test_policy_grid import FIPO, LAYOUTS, exported
from tests.distributed.tiny import write_model
from tests.ranks import run_ranks

LAYOUT = LAYOUTS["tp2"]
RANKS = 2
NEWEST, OLDER = "iteration_000002", "iteration_000001"


# --- a run ---------------------------------------------------------------------------------------------------------------------


def settings(model: Path, run_dir: Path, *overrides: str) -> Config:
    fixed = ("parallel.tensor_model_parallel_size=2", "checkpoint.keep_last=2")
    return load_config(None, [f"model.path={model}", f"run_dir={run_dir}", *fixed, *overrides])


def train_and_write(rank: int, world_size: int, model: Path, steps: int, folder: Path) -> tuple[dict[str, FileRecord], dict]:
    policy, shards = new_policy(model, LAYOUT)
    for _ in range(steps):
        policy.policy_step(shards, FIPO, lr=1e-3)
    save_rng(folder, rank)
    CheckpointWriter().start(policy.modules, policy.optimizer, folder / "weights", asynchronous=False)
    return hash_files(folder, rank, world_size), exported(policy)


def save(directory: RunDirectory, model: Path, iteration: int) -> dict[str, torch.Tensor]:
    """A checkpoint as the run makes it; returns the weights in it."""
    pending = directory.begin_save(LoopState(iteration, iteration, rollout={"position": iteration}))
    written = run_ranks(RANKS, train_and_write, model, iteration, pending.partial)
    directory.commit(pending, {name: record for part, _ in written for name, record in part.items()})
    return written[0][1]


def resume(model: Path, run_dir: Path) -> tuple[Path, LoopState]:
    """What a run does before it loads anything, and then the process ends."""
    directory = RunDirectory(run_dir)
    try:
        directory.claim(settings(model, run_dir))
        checkpoint = directory.latest()
        assert checkpoint is not None
        manifest = read_manifest(checkpoint)
        directory.refuse_damaged(checkpoint, [p for rank in range(RANKS) for p in check_files(checkpoint, manifest, rank, RANKS)])
        return checkpoint, directory.load_state(checkpoint)
    finally:
        unlock(directory)


def unlock(directory: RunDirectory) -> None:
    if directory._lock_file is not None:
        directory._lock_file.close()


def load_into_ranks(rank: int, world_size: int, model: Path, checkpoint: Path) -> tuple[bool, dict[str, torch.Tensor]]:
    policy, _ = new_policy(model, LAYOUT)
    load_checkpoint(policy.modules, policy.optimizer, checkpoint / "weights")
    return load_rng(checkpoint, rank, world_size), exported(policy)


@dataclass
class Made:
    model: Path
    run_dir: Path
    weights: dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A run of two iterations, both saved. Tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    model = write_model(folder / "model", layers=2)
    (model / "tokenizer.json").write_text("{}")
    directory = RunDirectory(folder / "run")
    directory.claim(settings(model, folder / "run"))
    return Made(model, folder / "run", {iteration: save(directory, model, iteration) for iteration in (1, 2)})


@pytest.fixture
def run_dir(made, tmp_path) -> Path:
    copy = shutil.copytree(made.run_dir, tmp_path / "run", symlinks=True)
    save_config(settings(made.model, copy), copy / "config.yaml")
    return copy


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder but the lock, which belongs to whoever looks."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.name != ".lock":
            found[str(path)] = path.read_bytes() if path.is_file() else "folder"
    return found


# --- damages to the newest checkpoint ------------------------------------------------------------------------------------------


def shard(checkpoint: Path) -> Path:
    return max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 0x40
    path.write_bytes(content)


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def zero_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[512:1024] = bytes(512)
    path.write_bytes(content)


def swap_shards(checkpoint: Path) -> None:
    one, other, *_ = sorted((checkpoint / "weights").glob("*.distcp"))
    one.rename(checkpoint / "held")
    other.rename(one)
    (checkpoint / "held").rename(other)


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def half_copied(checkpoint: Path) -> None:
    for name in sorted(read_manifest(checkpoint).files)[::2]:
        (checkpoint / name).unlink()


def weights_only(checkpoint: Path) -> None:
    """What a conversion writes: a manifest of its own, and no state of a loop."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("loop.json", "config.yaml"):
        (checkpoint / name).unlink()
        del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def older_format(checkpoint: Path) -> None:
    """Version 0.1 wrote weights/ and loop.json and nothing else."""
    for name in ("rng", "hf"):
        shutil.rmtree(checkpoint / name)
    for name in ("manifest.json", "config.yaml"):
        (checkpoint / name).unlink()
    (checkpoint / "loop.json").write_text('{"iteration": 2, "weight_version": 2, "dataset": {}, "surplus": []}')


def file_in_its_place(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("not a folder")


def older_renamed(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name(OLDER), checkpoint)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda c: truncate(shard(c)), r"\.distcp has [\d,]+ bytes instead of"),
    "emptied shard": (lambda c: truncate(shard(c), 0), r"\.distcp has 0 bytes instead of"),
    "grown shard": (lambda c: shard(c).write_bytes(shard(c).read_bytes() + b"x"), r"\.distcp has [\d,]+ bytes instead of"),
    "flipped bit": (lambda c: flip(shard(c)), r"\.distcp has other content"),
    "flipped last bit": (lambda c: flip(shard(c), 0.99999), r"\.distcp has other content"),
    "zeroed block": (lambda c: zero_block(shard(c)), r"\.distcp has other content"),
    "missing shard": (lambda c: shard(c).unlink(), r"\.distcp is missing"),
    "swapped shards": (swap_shards, r"\.distcp has"),
    "folder for a shard": (lambda c: by_folder(shard(c)), r"\.distcp has"),
    "dangling link for a shard": (lambda c: by_dangling_link(shard(c)), r"\.distcp is missing"),
    "missing index": (lambda c: (c / "weights/.metadata").unlink(), r"\.metadata is missing"),
    "flipped bit in the index": (lambda c: flip(c / "weights/.metadata"), r"\.metadata has other content"),
    "missing common state": (lambda c: (c / "weights/common.pt").unlink(), r"common\.pt is missing"),
    "missing random states": (lambda c: (c / "rng/rank_00001.safetensors").unlink(), r"rank_00001\.safetensors is missing"),
    "flipped random states": (lambda c: flip(c / "rng/rank_00000.safetensors"), r"rank_00000\.safetensors has other content"),
    "missing companion": (lambda c: (c / "hf/tokenizer.json").unlink(), r"hf/tokenizer\.json is missing"),
    "extra file": (lambda c: (c / "weights/__9_9.distcp").write_text("x"), r"__9_9\.distcp is not in the manifest"),
    "missing loop state": (lambda c: (c / "loop.json").unlink(), r"loop\.json is missing"),
    "truncated loop state": (lambda c: truncate(c / "loop.json"), r"loop\.json has [\d,]+ bytes"),
    "another loop state": (lambda c: replace_in(c / "loop.json", '"position": 2', '"position": 3'), r"loop\.json has other content"),
    "edited settings": (lambda c: replace_in(c / "config.yaml", "seed: 1", "seed: 2"), r"config\.yaml has other content"),
    "missing settings": (lambda c: (c / "config.yaml").unlink(), r"config\.yaml is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"manifest\.json cannot be read \(No such file"),
    "empty manifest": (lambda c: truncate(c / "manifest.json", 0), r"manifest\.json is damaged"),
    "truncated manifest": (lambda c: truncate(c / "manifest.json"), r"manifest\.json is damaged"),
    "manifest of another": (lambda c: shutil.copy(c.with_name(OLDER) / "manifest.json", c), "has other content|bytes instead of"),
    "manifest that lies": (lambda c: replace_in(c / "manifest.json", '"size": ', '"size": 1'), "bytes instead of"),
    "format of an older version": (lambda c: replace_in(c / "manifest.json", '"format": 1', '"format": 0'), "format 0 and this version"),
    "format of a later version": (lambda c: replace_in(c / "manifest.json", '"format": 1', '"format": 2'), "format 2 and this version"),
    "version without manifests": (older_format, r"manifest\.json cannot be read \(No such file"),
    "half copied": (half_copied, "is missing"),
    "empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "cannot be read"),
    "file in its place": (file_in_its_place, "cannot be read"),
    "converted weights": (weights_only, r"config\.yaml is not in the manifest"),
    "older one renamed": (older_renamed, r"loop\.json is of iteration 1"),
}  # fmt: skip


def test_an_undamaged_run_goes_on_from_its_newest_checkpoint(made, run_dir):
    newest = run_dir / "checkpoints" / NEWEST
    assert resume(made.model, run_dir) == (newest, LoopState(2, 2, rollout={"position": 2}))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(made, run_dir, name):
    damage, reason = DAMAGES[name]
    newest, older = run_dir / "checkpoints" / NEWEST, run_dir / "checkpoints" / OLDER
    damage(newest)
    before = contents(run_dir)
    with pytest.raises(UserError, match=reason) as caught:
        resume(made.model, run_dir)
    message = str(caught.value)
    assert str(newest) in message
    assert f"remove that folder to go on from {OLDER}" in message
    assert "\n" not in message
    assert contents(run_dir) == before, "a refusal changes nothing"
    if newest.is_dir():
        shutil.rmtree(newest)
    else:
        newest.unlink()
    assert resume(made.model, run_dir) == (older, LoopState(1, 1, rollout={"position": 1}))
    assert (run_dir / "checkpoints/latest").resolve() == older


def test_the_checkpoint_before_loads_to_the_bits_it_was_saved_with(made, run_dir):
    shutil.rmtree(run_dir / "checkpoints" / NEWEST)
    checkpoint, _ = resume(made.model, run_dir)
    (same_layout, weights), _ = run_ranks(RANKS, load_into_ranks, made.model, checkpoint)
    assert same_layout
    assert weights.keys() == made.weights[1].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.weights[1].items())
    assert any(not torch.equal(tensor, made.weights[2][name]) for name, tensor in made.weights[1].items())


def test_a_checkpoint_without_an_older_one_says_so(made, run_dir):
    shutil.rmtree(run_dir / "checkpoints" / OLDER)
    flip(shard(run_dir / "checkpoints" / NEWEST))
    with pytest.raises(UserError, match="to start the run again, since there is no older checkpoint"):
        resume(made.model, run_dir)


def test_an_older_damaged_checkpoint_is_not_offered(made, run_dir):
    truncate(run_dir / "checkpoints" / OLDER / "manifest.json", 0)
    assert resume(made.model, run_dir)[1].iteration == 2
    flip(shard(run_dir / "checkpoints" / NEWEST))
    with pytest.raises(UserError, match="there is no older checkpoint"):
        resume(made.model, run_dir)


def test_a_checkpoint_of_another_run_is_refused(made, run_dir):
    foreign = shutil.copytree(run_dir / "checkpoints" / NEWEST, run_dir / "checkpoints/iteration_000003")
    replace_in(foreign / "loop.json", '"iteration": 2', '"iteration": 3')
    replace_in(foreign / "config.yaml", "seed: 1", "seed: 9")
    write_manifest(foreign, hash_files(foreign), {})
    before = contents(run_dir)
    with pytest.raises(UserError, match=r"iteration_000003 belongs to a run with other settings \(seed was 9 and is 1\)"):
        resume(made.model, run_dir)
    assert contents(run_dir) == before
    shutil.rmtree(foreign)
    assert resume(made.model, run_dir)[1].iteration == 2


# --- things in the way ---------------------------------------------------------------------------------------------------------


def test_a_latest_that_points_to_nowhere_is_put_right(made, run_dir):
    link = run_dir / "checkpoints/latest"
    link.unlink()
    link.symlink_to("iteration_000777")
    assert resume(made.model, run_dir)[0].name == NEWEST
    assert link.resolve().name == NEWEST


@pytest.mark.parametrize("name", ["checkpoints/latest", ".lock", "checkpoints/.latest"])
def test_a_folder_in_the_way_is_refused_and_nothing_lost(made, run_dir, name):
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).mkdir()
    (run_dir / name / "file").write_text("precious")
    before = contents(run_dir)
    with pytest.raises(UserError, match="cannot write"):
        resume(made.model, run_dir)
    after = contents(run_dir)
    assert before.items() <= after.items()
    shutil.rmtree(run_dir / name)
    assert resume(made.model, run_dir)[1].iteration == 2


def test_a_file_where_the_checkpoints_belong_is_refused(made, run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        RunDirectory(run_dir).claim(settings(made.model, run_dir))


def test_a_folder_that_appears_while_saving_is_left_alone(made, run_dir):
    directory = RunDirectory(run_dir)
    directory.claim(settings(made.model, run_dir))
    pending = directory.begin_save(LoopState(3, 3))
    (pending.target).mkdir()
    (pending.target / "notes").write_text("precious")
    with pytest.raises(UserError, match="appeared while"):
        directory.commit(pending, {})
    assert (pending.target / "notes").read_text() == "precious"
    assert not pending.partial.exists()


# --- disks that refuse ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(made, tmp_path) -> Iterator[Path]:
    """A disk of 40 MiB with a copy of the run on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk]).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        shutil.copytree(made.run_dir, disk / "run", symlinks=True)
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    filler = disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave_bytes)))
    return filler


def write_as_ranks(pending: PendingSave) -> dict[str, FileRecord]:
    (pending.partial / "weights/__0_0.distcp").write_bytes(bytes(100_000))
    return hash_files(pending.partial)


def write_or_say_why(rank: int, world_size: int, model: Path, folder: Path) -> str:
    try:
        train_and_write(rank, world_size, model, 3, folder)
    except UserError as error:
        return str(error)
    return "written"


def assert_intact(directory: RunDirectory) -> None:
    """Both checkpoints as they were, and no trace of a third."""
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == [OLDER, NEWEST, "latest"]
    for name in (OLDER, NEWEST):
        folder = directory.checkpoints / name
        assert check_files(folder, read_manifest(folder)) == []


@pytest.mark.parametrize("moment", ["begin", "ranks", "manifest"])
def test_a_full_disk_costs_the_new_checkpoint_only(made, small_disk, moment):
    directory = RunDirectory(small_disk / "run")
    directory.claim(settings(made.model, small_disk / "run"))
    if moment == "begin":
        filler = fill(small_disk, 0)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            directory.begin_save(LoopState(3, 3))
    elif moment == "ranks":
        filler = fill(small_disk, 2**20)
        pending = directory.begin_save(LoopState(3, 3))
        for message in run_ranks(RANKS, write_or_say_why, made.model, pending.partial):
            assert "cannot write the checkpoint" in message
            assert "No space left on device" in message
        directory.abandon(pending)
    else:
        pending = directory.begin_save(LoopState(3, 3))
        records = write_as_ranks(pending)
        filler = fill(small_disk, 0)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            directory.commit(pending, records)
    assert_intact(directory)
    filler.unlink()
    pending = directory.begin_save(LoopState(3, 3))
    directory.commit(pending, write_as_ranks(pending))
    assert directory.latest().name == "iteration_000003"


def test_a_read_only_disk_is_one_sentence(made, small_disk):
    directory = RunDirectory(small_disk / "run")
    directory.claim(settings(made.model, small_disk / "run"))
    unlock(directory)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = contents(small_disk)
    for attempt in (lambda: directory.begin_save(LoopState(3, 3)), lambda: resume(made.model, small_disk / "run")):
        with pytest.raises(UserError, match=r"cannot write .*Read-only file system"):
            attempt()
    assert contents(small_disk) == before
    assert_intact(directory)


def save_under_a_limit(rank: int, world_size: int, model: Path, run_dir: Path, limit: int, pending: PendingSave | None) -> str:
    """Where the operating system lets no file grow beyond `limit` bytes."""
    directory = RunDirectory(run_dir)
    directory.claim(settings(model, run_dir))
    if pending is None and limit > 1000:
        pending = directory.begin_save(LoopState(3, 3))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        directory.commit(pending, {}) if pending else directory.begin_save(LoopState(3, 3))
    except UserError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("limit", [10, 1001], ids=["begin", "manifest"])
def test_a_file_that_cannot_grow_costs_the_new_checkpoint_only(made, run_dir, limit):
    (message,) = run_ranks(1, save_under_a_limit, made.model, run_dir, limit, None)
    assert message.startswith(f"cannot write {run_dir}")
    assert "File too large" in message
    directory = RunDirectory(run_dir)
    directory.claim(settings(made.model, run_dir))
    assert_intact(directory)
