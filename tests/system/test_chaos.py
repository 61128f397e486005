"""Engines die, hang and send malformed replies all the time; the final weights equal those of a calm run.

This is stronger than a test that the run survives: a row scored as zero, a response of other weights, a
prompt skipped or sampled twice would each change the final weights.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_fipo.driver.rollout.dump import read_dump
from tests.system.runs import ROOT, iterations, run, train_arguments, weights

ITERATIONS = 20
EXACT = (
    "deterministic=true",
    f"iterations={ITERATIONS}",
    "evaluation.before_training=false",
    "rollout.num_engines=2",
    "rollout.dump_every=1",
)


def disturb(run: psutil.Process, rng: random.Random) -> str | None:
    """Kill or stop an engine of this run; None if there is none at the moment."""
    engines = [
        child
        for child in run.children(recursive=True)
        if any("GarblingEngine" in word for word in child.cmdline())
    ]
    if not engines:
        return None
    number = rng.choice([signal.SIGKILL, signal.SIGSTOP])
    os.kill(rng.choice(engines).pid, number)
    return number.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_chaos_among_the_engines_leaves_no_trace_in_the_weights(tmp_path: Path):
    calm, chaos = tmp_path / "calm", tmp_path / "chaos"
    run(*train_arguments(calm, *EXACT))
    arguments = train_arguments(
        chaos,
        *EXACT,
        "rollout.max_restarts=1000",
        "rollout.max_retries=50",
        "rollout.health_timeout_s=8",
    )
    command = [sys.executable, "-m", "tests.system.garbling_run", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rng, done = random.Random(1), []
    while process.poll() is None:
        time.sleep(rng.uniform(5, 25))
        try:
            done.append(disturb(psutil.Process(process.pid), rng))
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]

    steps = iterations(chaos)
    totals = {
        name: sum(step[f"engines/{name}"] for step in steps)
        for name in ("deaths", "hangs", "malformed", "retries")
    }
    print(f"{done.count('SIGKILL')} killed, {done.count('SIGSTOP')} stopped; the run counted {totals}")
    assert all(totals.values())
    assert weights(chaos) == weights(calm)
    for number, step in enumerate(steps, start=1):
        assert step["groups/failed"] == 0
        assert (
            step["tokens/generated"] == step["tokens/used"] + step["tokens/filtered"] + step["tokens/dropped"]
        )
        for trajectory in (
            trajectory
            for group in read_dump(chaos / f"rollouts/iteration_{number:06d}.parquet")
            for trajectory in group
        ):
            assert [span.version for span in trajectory.spans] == [number - 1]
            assert len(trajectory.response_ids)
