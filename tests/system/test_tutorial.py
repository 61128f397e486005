"""The page `your-own-task.md`, executed from top to bottom in an empty folder, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.runs import ROOT, iterations

PAGE = "docs/your-own-task.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files are written under their titles. All commands run in one shell, which stops at the first that fails."""
    folder = tmp_path_factory.mktemp("own-task")
    commands = []
    for language, title, text in BLOCK.findall((ROOT / PAGE).read_text()):
        if title:
            (folder / title).write_text(text)
        else:
            assert language == "bash", f"{PAGE} has a block of {language} without a title"
            commands.append(text)
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"FIPO": str(ROOT), "PATH": search, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder / "output").write_text(done.stdout)
    return folder


def test_the_reward_s_number_is_in_the_metrics(folder):
    found = iterations(folder / "runs/my_task")
    assert len(found) == 2
    assert all("reward/attempts" in values for values in found)


def test_check_task_shows_right_and_wrong_responses(folder):
    assert "#1*1+1" in (folder / "output").read_text()


def test_the_tool_was_used(folder):
    values = iterations(folder / "runs/my_tool")
    assert all(iteration["environment/turns"] > 1 for iteration in values)
