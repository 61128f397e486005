"""A checkpoint's manifest lists its files; every difference is one sentence that names the file."""

import hashlib
import json
from pathlib import Path
from threading import Timer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.checkpoint import manifest as module
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    Manifest,
    check_files,
    hash_files,
    list_files,
    read_manifest,
    share_of,
    write_manifest,
    wrong_names,
)
from megatron_fipo.errors import UserError

INFO = {"iteration": 5, "layout": {"tensor_model_parallel_size": 2}, "versions": {"torch": "2.13"}}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder shaped like a checkpoint: hidden, nested and empty files."""
    for name, content in {
        "weights/.metadata": b"m",
        "weights/__0_0.distcp": b"x" * 1000,
        "loop.json": b"{}",
        "hf/empty": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, hash_files(tmp_path, list_files(tmp_path)), INFO)
    return tmp_path


def problems_of(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    return wrong_names(folder, manifest) or check_files(folder, manifest.files)


def test_what_is_written_is_read_back(folder):
    manifest = read_manifest(folder)
    assert manifest.info == INFO
    assert sorted(manifest.files) == ["hf/empty", "loop.json", "weights/.metadata", "weights/__0_0.distcp"]
    assert manifest.files["weights/__0_0.distcp"] == FileRecord(1000, hashlib.sha256(b"x" * 1000).hexdigest())
    assert problems_of(folder) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shares=st.integers(1, 7))
def test_the_shares_check_every_file_once(folder, shares):
    files = read_manifest(folder).files
    parts = [share_of(files, share, shares) for share in range(shares)]
    assert sum(map(len, parts)) == len(files)
    (folder / "loop.json").unlink()
    problems = [problem for part in parts for problem in check_files(folder, part)]
    (folder / "loop.json").write_text("{}")
    assert problems == [f"{folder}/loop.json is missing"]


def test_a_file_that_a_node_sees_late_is_intact(folder, monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.01)
    shard = folder / "weights/__0_0.distcp"
    hidden = shard.rename(folder.parent / "late")
    appears = Timer(0.3, lambda: hidden.rename(shard))
    appears.start()
    try:
        assert check_files(folder, read_manifest(folder).files, within_s=60.0) == []
    finally:
        appears.join()


def test_a_file_that_never_appears_is_missing(folder, monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.01)
    (folder / "loop.json").unlink()
    files = read_manifest(folder).files
    assert check_files(folder, files, within_s=0.05) == [f"{folder}/loop.json is missing"]


def test_files_larger_than_a_block_are_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    (tmp_path / "file").write_bytes(bytes(range(100)) * 3)
    assert hash_files(tmp_path, ["file"])["file"] == FileRecord(
        300, hashlib.sha256(bytes(range(100)) * 3).hexdigest()
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b"x" * 999), "has 999 bytes instead of 1,000"),
        (lambda path: path.write_bytes(b"x" * 500 + b"y" + b"x" * 499), "has other content than was written"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("more").write_text("z"), "more is not in the manifest"),
        (lambda path: path.with_name("link").symlink_to("nowhere"), "link is not in the manifest"),
        (lambda path: (path.unlink(), path.mkdir()), "__0_0.distcp has "),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is missing"),
    ],
    ids=["truncated", "flipped", "missing", "extra", "extra-link", "folder", "dangling"],
)
def test_each_damage_is_one_sentence(folder, damage, sentence):
    damage(folder / "weights/__0_0.distcp")
    (problem,) = problems_of(folder)
    assert sentence in problem
    assert str(folder / "weights") in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "is damaged"),
        ('{"format": 1, "files": {"loop', "is damaged"),
        ("[]", "is damaged"),
        ('{"files": {}, "info": {}}', "is damaged"),
        ('{"format": 1, "files": {"a": {"size": 1}}, "info": {}}', "is damaged"),
        (
            '{"format": 1, "files": {"../../etc/passwd": {"size": 1, "sha256": "x"}}, "info": {}}',
            "not a path inside",
        ),
        (
            '{"format": 1, "files": {"/etc/passwd": {"size": 1, "sha256": "x"}}, "info": {}}',
            "not a path inside",
        ),
        ('{"format": 0, "files": {}, "info": {}}', "format 0 and this version reads 1"),
        ('{"format": 2}', "format 2 and this version reads 1"),
        (b"\xff\xfe\x00", "is damaged"),
    ],
)
def test_a_manifest_that_says_nothing_is_refused(folder, content, words):
    path = folder / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_does_not_depend_on_the_order_of_the_records(tmp_path):
    records = {name: FileRecord(1, name) for name in "abc"}
    for name in records:
        (tmp_path / name).write_text("x")
    write_manifest(tmp_path, records, INFO)
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path, dict(reversed(records.items())), INFO)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert json.loads(first)["format"] == 1
    assert read_manifest(tmp_path) == Manifest(records, INFO)


def test_a_disk_that_refuses_is_one_sentence(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*manifest\.json"):
        write_manifest(tmp_path, {}, INFO)
