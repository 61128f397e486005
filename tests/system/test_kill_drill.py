"""The kill drill sees every difference between two runs, finds the processes of its own run only, and passes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fipo.run_dir.metrics_log import MetricsLog
from tests.system.kill_drill import ROOT, differences
from tests.system.runs import check, ended

# A family like a run's: the title of a process is its first argument, as Ray sets it.
FAMILY = """
import subprocess, sys, time
code = "import os, sys, time; os.fork() if 'RankActor' in sys.argv[1] else None; time.sleep(600)"
for title in ("raylet", "ray::RankActor.call", "ray::RankActor", "ray::LocalEngine.generate", "ray::IDLE"):
    subprocess.Popen([title, "-c", code, title], executable=sys.executable)
time.sleep(600)
"""
ADOPT = """
import json, subprocess, sys, time
from tests.system import kill_drill
kill_drill.adopt_orphans()

driver = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
deadline = time.monotonic() + 200
while len(kill_drill.descendants()) < 8 and time.monotonic() < deadline:
    time.sleep(0.05)
found = {victim: len(kill_drill.find(victim, driver.pid)) for victim in kill_drill.VICTIMS}
driver.kill()
driver.wait()
found["orphans"] = len(kill_drill.descendants())
kill_drill.end_descendants()
found["left"] = len(kill_drill.descendants())
print(json.dumps(found))
"""


def finished(
    folder: Path, weights: bytes = b"weights", loss: float = 0.1, seconds: float = 1.0, iterations: int = 2
) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_bytes(weights)
    log = MetricsLog(folder)
    for iteration in range(1, iterations + 1):
        log.log(
            "iteration", iteration, {"policy/loss": loss, "policy/nan": float("nan"), "time/total": seconds}
        )
    return folder


def test_every_difference_is_seen_and_times_are_none(tmp_path):
    one = finished(tmp_path / "one")
    assert differences(one, finished(tmp_path / "same", seconds=2.0)) == []
    assert differences(one, finished(tmp_path / "bit", weights=b"weightt")) == [
        "model/model.safetensors differs"
    ]
    assert differences(one, finished(tmp_path / "ulp", loss=0.10000000000000002)) == [
        f"iteration {iteration} differs in policy/loss" for iteration in (1, 2)
    ]
    assert differences(one, finished(tmp_path / "short", iterations=1)) == ["iteration 2 is in one log only"]
    (tmp_path / "empty").mkdir()
    assert "no weights to compare" in differences(tmp_path / "empty", tmp_path / "empty")


def test_victims_and_orphans_are_found_and_strangers_left_alone():
    stranger = subprocess.Popen(
        ["ray::RankActor", "-c", "import time; time.sleep(600)"], executable=sys.executable
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", ADOPT, str(stranger.pid), FAMILY],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        done = check(ended(process))
        assert json.loads(done.stdout) == {
            "driver": 1,
            "trainer rank": 2,
            "rollout engine": 1,
            "checkpoint writer": 2,
            "orphans": 7,
            "left": 0,
        }
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_that_lost_a_process_end_with_the_same_bits(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.kill_drill", "5", "--seed", "3", "--folder", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same bits") == 5, f"{done.stdout} after {time.monotonic() - start:.0f} s"
