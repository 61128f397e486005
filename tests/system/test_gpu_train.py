"""The GPU check's section with the complete command, rehearsed: a real run on a CPU, and the rows made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.system.runs import ROOT
from tools.bench.harness import REHEARSAL, ROWS_FILE
from tools.bench.report import FIGURE, OK


def test_the_complete_command_is_run_and_reported(tmp_path: Path):
    messages = tmp_path / "rows.jsonl"
    environment = os.environ | {REHEARSAL: "1", ROWS_FILE: str(messages), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.gpu_train"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    rows = [
        message["row"] for message in map(json.loads, messages.read_text().splitlines()) if "row" in message
    ]
    assert [row["verdict"] for row in rows] == [OK, FIGURE, FIGURE], rows
    first, seconds, accuracy = rows
    assert (first["correctness"], first["figures"]["sigma"]) == (True, 0.0)
    assert 0 < seconds["figures"]["rollout_seconds"] < seconds["figures"]["iteration_seconds"]
    assert seconds["figures"]["responses"] >= 16
    assert 0 <= accuracy["figures"]["accuracy_before"] <= 1
    assert list(tmp_path.iterdir()) == [messages]
