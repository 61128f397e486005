"""Start `megatron-fipo` on tiny runs, in a process or in this one, and read what a run wrote."""

import contextlib
import gc
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_fipo.cli.main import main

ROOT = Path(__file__).parents[2]
LONGEST_S = 240.0
"""Longest that a process may take to start or to end, on a machine that is ten times slower than usual."""
MARK = "FIPO_TEST_RUN"
"""Environment variable that marks a process and all that descend from it."""
TINY = [
    "batch.prompts_per_iteration=4",
    "batch.responses_per_prompt=4",
    "batch.mini_batch_prompts=2",
    "batch.max_tokens_per_micro_batch=512",
    "rollout.prompts_in_flight=8",
    "rollout.max_response_length=64",
    "data.evaluation_size=8",
    "evaluation.samples_per_problem=1",
    "evaluation.every=0",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
]


def train_arguments(run_dir: Path, *overrides: str) -> list[str]:
    return ["train", "examples/countdown/fipo.yaml", *TINY, f"run_dir={run_dir}", *overrides]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_fipo.cli", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen:
    """Start the command as a process, on a Ray cluster of its own."""
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(
    *arguments: object, expect: int = 0, timeout: float = 600, folder: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run the command as a process in `folder`, on a Ray cluster of its own."""
    process = subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return check(ended(process, timeout), expect)


def ended(process: subprocess.Popen, timeout: float = LONGEST_S) -> subprocess.CompletedProcess:
    """The process when it has ended, with its output. A process that has not ended within `timeout` seconds fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(
            f"not ended after {timeout:g} s: {process.args}\n{shown(out)}{shown(err)}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out or "", err or "")


def run_here(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess:
    """Run the command in this process, which has imported everything."""
    words = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    gc.collect()  # an exception may keep a run's lock, which a process releases when it ends
    return check(subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue()), expect)


def check(done: subprocess.CompletedProcess, expect: int = 0) -> subprocess.CompletedProcess:
    assert done.returncode == expect, shown(done.stdout) + shown(done.stderr)
    return done


def shown(output: str | None) -> str:
    """The end of an output, for the message of a failed test."""
    return (output or "")[-6000:]


def iterations(run_dir: Path) -> list[dict]:
    """Metrics of each iteration."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["values"] for record in records if record["kind"] == "iteration"]


def weights(run_dir: Path) -> bytes:
    """The exported model."""
    return (run_dir / "model/model.safetensors").read_bytes()


COSTS = (
    "time/",
    "overhead/",
    "throughput/",
    "mfu/",
    "wait/",
    "memory/",
    "engine_",
    "evaluation/seconds",
)
"""Metrics that measure time and memory."""
RECOVERY = "recovery/"
"""Metrics that count restarts."""
BY_TIMING = (*COSTS, RECOVERY, "tokens/generated", "tokens/dropped", "rollout/unused_share")
"""Metrics that may differ between equal runs: costs, and the progress of prompts that were started and not used."""


def same_numbers(one: dict, other: dict, *excluded: str) -> bool:
    """Whether the metrics are equal bit for bit, except those that depend on timing and those `excluded` (prefixes)."""
    one, other = (
        {k: v for k, v in values.items() if not k.startswith((*BY_TIMING, *excluded))}
        for values in (one, other)
    )
    return one == other


def wait_for_an_iteration(process: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + 400
    while not ((run_dir / "metrics.jsonl").exists() and iterations(run_dir)):
        assert process.poll() is None, shown(process.communicate()[0])
        assert time.monotonic() < deadline
        time.sleep(0.1)


def default_signals() -> None:
    """For `preexec_fn`: signals that whoever started the tests ignores, as `nohup` and background jobs of a shell do."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def marked(mark: str) -> list[psutil.Process]:
    """The processes with this value of `MARK` in their environment, which children inherit."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
