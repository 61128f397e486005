"""Damage to a run's folder from outside: each is refused with its reason, and older checkpoints are not
changed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_fipo.checkpoint.manifest import hash_files, list_files, read_manifest, write_manifest
from megatron_fipo.errors import UserError
from megatron_fipo.model.mcore import COMMON_STATE_FILE
from megatron_fipo.run_dir.loop_state import LoopState, RolloutState
from megatron_fipo.run_dir.run_directory import RunDirectory
from tests.ranks import run_ranks
from tests.run_dir.claimed_run import claim
from tests.run_dir.saved_run import NEWEST, OLDER, RANKS, contents, load_into_ranks, resume, settings

COMMON_STATE = COMMON_STATE_FILE or "metadata.json"
"""From Megatron-Core 0.19 on it is part of the data; then the other file that only rank 0 writes."""

# Damage to the newest checkpoint


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
    one.rename(checkpoint / "aside")
    other.rename(one)
    (checkpoint / "aside").rename(other)


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


def by_pipe(checkpoint: Path) -> None:
    """With a manifest that says that the file is empty, as a pipe is."""
    path = shard(checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][path.relative_to(checkpoint).as_posix()]["size"] = 0
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    path.unlink()
    os.mkfifo(path)


def half_copied(checkpoint: Path) -> None:
    for name in sorted(read_manifest(checkpoint).files)[::2]:
        (checkpoint / name).unlink()


def weights_only(checkpoint: Path) -> None:
    """What a conversion writes: another manifest, and no loop state."""
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
    (checkpoint / "loop.json").write_text(
        '{"iteration": 2, "weight_version": 2, "dataset": {}, "surplus": []}'
    )


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
    "missing common state": (lambda c: (c / "weights" / COMMON_STATE).unlink(), rf"{re.escape(COMMON_STATE)} is missing"),
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
    "manifest with wrong sizes": (lambda c: replace_in(c / "manifest.json", '"size": ', '"size": 1'), "bytes instead of"),
    "manifest with an endless size": (lambda c: replace_in(c / "manifest.json", '"size": ', '"size": 1e999'), r"manifest\.json is damaged"),
    "nested manifest": (lambda c: (c / "manifest.json").write_text("[" * 100_000), r"manifest\.json is damaged"),
    "pipe for a shard": (by_pipe, r"\.distcp has no content: it is a folder, pipe or device"),
    "format of an older version": (lambda c: replace_in(c / "manifest.json", '"format": 1', '"format": 0'), "format 0 and this version"),
    "format of a later version": (lambda c: replace_in(c / "manifest.json", '"format": 1', '"format": 2'), "format 2 and this version"),
    "version without manifests": (older_format, r"manifest\.json cannot be read \(No such file"),
    "half copied": (half_copied, "is missing"),
    "empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "cannot be read"),
    "file in its place": (file_in_its_place, "cannot be read"),
    "converted weights": (weights_only, r"config\.yaml is not in the manifest"),
    "older one renamed": (older_renamed, r"loop\.json is of iteration 1"),
}  # fmt: skip


def test_an_undamaged_run_goes_on_from_its_newest_checkpoint(saved_run, run_dir):
    newest = run_dir / "checkpoints" / NEWEST
    assert resume(saved_run.model, run_dir) == (
        newest,
        LoopState(2, 2, rollout=RolloutState({"position": 2})),
    )


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(saved_run, run_dir, name):
    damage, reason = DAMAGES[name]
    newest, older = run_dir / "checkpoints" / NEWEST, run_dir / "checkpoints" / OLDER
    damage(newest)
    before = contents(run_dir)
    with pytest.raises(UserError, match=reason) as caught:
        resume(saved_run.model, run_dir)
    message = str(caught.value)
    assert str(newest) in message
    assert f"remove that folder to resume from {OLDER}" in message
    assert "\n" not in message
    assert contents(run_dir) == before, "a refusal changes nothing"
    if newest.is_dir():
        shutil.rmtree(newest)
    else:
        newest.unlink()
    assert resume(saved_run.model, run_dir) == (older, LoopState(1, 1, rollout=RolloutState({"position": 1})))
    assert (run_dir / "checkpoints/latest").resolve() == older


def test_the_checkpoint_before_loads_to_the_bits_it_was_saved_with(saved_run, run_dir):
    shutil.rmtree(run_dir / "checkpoints" / NEWEST)
    checkpoint, _ = resume(saved_run.model, run_dir)
    (same_layout, weights), _ = run_ranks(RANKS, load_into_ranks, saved_run.model, checkpoint)
    assert same_layout
    assert weights.keys() == saved_run.weights[1].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved_run.weights[1].items())
    assert any(
        not torch.equal(tensor, saved_run.weights[2][name]) for name, tensor in saved_run.weights[1].items()
    )


def test_a_checkpoint_without_an_older_one_says_so(saved_run, run_dir):
    shutil.rmtree(run_dir / "checkpoints" / OLDER)
    flip(shard(run_dir / "checkpoints" / NEWEST))
    with pytest.raises(UserError, match="to start the run again, because there is no older checkpoint"):
        resume(saved_run.model, run_dir)


def test_an_older_damaged_checkpoint_is_not_offered(saved_run, run_dir):
    truncate(run_dir / "checkpoints" / OLDER / "manifest.json", 0)
    assert resume(saved_run.model, run_dir)[1].iteration == 2
    flip(shard(run_dir / "checkpoints" / NEWEST))
    with pytest.raises(UserError, match="there is no older checkpoint"):
        resume(saved_run.model, run_dir)


def test_a_checkpoint_of_another_run_is_refused(saved_run, run_dir):
    foreign = shutil.copytree(run_dir / "checkpoints" / NEWEST, run_dir / "checkpoints/iteration_000003")
    replace_in(foreign / "loop.json", '"iteration": 2', '"iteration": 3')
    replace_in(foreign / "config.yaml", "seed: 1", "seed: 9")
    write_manifest(foreign, hash_files(foreign, list_files(foreign)), {})
    before = contents(run_dir)
    with pytest.raises(
        UserError, match=r"iteration_000003 belongs to a run with other settings \(seed was 9 and is 1\)"
    ):
        resume(saved_run.model, run_dir)
    assert contents(run_dir) == before
    shutil.rmtree(foreign)
    assert resume(saved_run.model, run_dir)[1].iteration == 2


# Things in the way


def test_a_latest_that_points_to_nowhere_is_put_right(saved_run, run_dir):
    link = run_dir / "checkpoints/latest"
    link.unlink()
    link.symlink_to("iteration_000777")
    assert resume(saved_run.model, run_dir)[0].name == NEWEST
    assert link.resolve().name == NEWEST


@pytest.mark.parametrize("name", ["checkpoints/latest", ".lock", "checkpoints/.latest"])
def test_a_folder_in_the_way_is_refused_and_nothing_lost(saved_run, run_dir, name):
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).mkdir()
    (run_dir / name / "file").write_text("precious")
    before = contents(run_dir)
    with pytest.raises(
        UserError, match="is a folder and not a link" if name.endswith("/latest") else "cannot write"
    ):
        resume(saved_run.model, run_dir)
    after = contents(run_dir)
    assert before.items() <= after.items()
    shutil.rmtree(run_dir / name)
    assert resume(saved_run.model, run_dir)[1].iteration == 2


def test_a_run_copied_with_links_followed_resumes_once_the_copy_of_its_link_is_gone(saved_run, tmp_path):
    copied = shutil.copytree(saved_run.run_dir, tmp_path / "copied", symlinks=False)
    before = contents(copied)
    with pytest.raises(UserError, match=rf"latest is a folder .* remove it if it is a copy of {NEWEST}"):
        resume(saved_run.model, copied)
    assert contents(copied).items() >= before.items()
    shutil.rmtree(copied / "checkpoints/latest")
    assert resume(saved_run.model, copied)[1].iteration == 2


def test_a_file_where_the_checkpoints_belong_is_refused(saved_run, run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        claim(RunDirectory(run_dir), settings(saved_run.model, run_dir))


def test_a_folder_that_appears_while_saving_is_left_alone(saved_run, run_dir):
    directory = RunDirectory(run_dir)
    claim(directory, settings(saved_run.model, run_dir))
    pending = directory.begin_save(LoopState(3, 3))
    (pending.target).mkdir()
    (pending.target / "notes").write_text("precious")
    with pytest.raises(UserError, match="appeared while"):
        directory.commit(pending, {})
    assert (pending.target / "notes").read_text() == "precious"
    assert not pending.partial.exists()
