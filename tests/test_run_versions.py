"""What a run records of its software."""

import subprocess
from pathlib import Path

from megatron_fipo.environment import package_versions, run_versions, source_commit


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_source_tree(tmp_path: Path) -> None:
    package = tmp_path / "megatron_fipo"
    package.mkdir()
    source = package / "a.py"
    source.write_text("a = 1\n")
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "notes.txt").write_text("not of the package")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "second")
    source_commit.cache_clear()
    assert source_commit(tmp_path) == commit
    source.write_text("a = 2\n")
    source_commit.cache_clear()
    assert source_commit(tmp_path) == f"{commit}+changes"


def test_a_folder_within_another_repository_has_no_commit(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert source_commit(inner) is None
    (inner / ".git").write_text("gitdir: nowhere")
    source_commit.cache_clear()
    assert source_commit(inner) is None


def test_versions_of_a_run() -> None:
    found = run_versions()
    assert found.items() >= package_versions().items()
    assert found["commit"] == (source_commit() or "unknown")
