"""Standard output and error that are full, closed or not read: one sentence and an exit code, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.cli.streams import ReaderGone, checked_output
from megatron_fipo.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "config",
    "--help",
    "train --help",
    "doctor",
    "convert to-megatron examples/qwen2.5-32b --dry-run",
    "train examples/countdown/fipo.yaml --dry-run",
]


def run(words: str, redirection: str, unbuffered: str = "") -> subprocess.CompletedProcess:
    """Run a command in a shell. Python writes at once if `unbuffered` is not empty, else when its buffer is full."""
    return shell(f"{sys.executable} -m megatron_fipo.cli {words} {redirection}", unbuffered)


def shell(command: str, unbuffered: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", COMMANDS)
def test_standard_output_on_a_full_disk(words, unbuffered):
    done = run(words, ">/dev/full", unbuffered)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-fipo: cannot write to standard output: No space left on device;")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["config", "--help", "train absent.yaml"])
def test_standard_output_that_is_closed(words):
    done = run(words, ">&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-fipo: standard output is closed; redirect it to a file or to /dev/null\n"


@pytest.mark.parametrize(
    ("words", "redirection", "code"),
    [
        ("config sft", "2>/dev/full", 0),
        ("config sft", "2>&-", 0),
        ("train absent.yaml", "2>/dev/full", 2),
        ("train absent.yaml", "2>&-", 2),
        ("train", "2>/dev/full", 2),
        ("config", ">/dev/full 2>/dev/full", 2),
        ("config", ">&- 2>&-", 2),
    ],
)
def test_standard_error_that_cannot_be_written(words, redirection, code):
    done = run(words, redirection)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("tokens_per_step: 3000" in done.stdout) == (code == 0)


@pytest.mark.parametrize(
    "words", ["config", "train --help", "convert to-megatron examples/qwen2.5-32b --dry-run"]
)
def test_a_reader_that_has_seen_enough_is_no_error(words):
    done = run(words, "| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_the_error_of_a_command_matters_more_than_its_output():
    script = (
        "from megatron_fipo.cli.streams import checked_output\n"
        "with checked_output():\n    print('lost')\n    raise ValueError('its own')"
    )
    done = shell(f'{sys.executable} -c "{script}" >/dev/full')
    assert done.stderr.splitlines()[-1] == "ValueError: its own"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("error", "raised"), [(BrokenPipeError(), ReaderGone), (OSError(5, "Input/output error"), UserError)]
)
def test_only_errors_of_standard_output_are_explained(error, raised, monkeypatch, capsys):
    with pytest.raises(type(error)), checked_output():
        raise error
    monkeypatch.setattr(sys.stdout, "write", lambda text: (_ for _ in ()).throw(error))
    with pytest.raises(raised), checked_output():
        print("text")


@pytest.mark.parametrize("words", ["train", "sft"])
def test_what_is_missing_on_the_command_line(words):
    done = run(words, "")
    assert done.returncode == 2
    assert done.stderr.endswith("the following arguments are required: CONFIG\n")
