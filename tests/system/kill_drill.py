"""Kills processes of a training run at random moments and checks that it ends with the same bits as an undisturbed run.

    python -m tests.system.kill_drill 20 --seed 7
    python -m tests.system.kill_drill 5 parallel.data_parallel_size=2 rollout.mode=one_step_off

Trains the demo, made tiny and deterministic, once undisturbed. Then N times, each in a new folder: starts the same run, sends
SIGKILL to the driver, a trainer rank, a rollout engine or a checkpoint writer, runs the same command again until it is done,
and compares weights (bit for bit) and metrics (except times and failures of engines). Exits with 1 if any of them differs.
Linux only.
"""

import argparse
import ctypes
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_fipo.run_dir.metrics_log import read_metrics
from tests.system.runs import COSTS, RECOVERY

ROOT = Path(__file__).parents[2]
CONFIG = "examples/countdown/fipo.yaml"
TINY = (
    "deterministic=true",
    "iterations=5",
    "checkpoint.every=1",
    "checkpoint.keep_last=2",
    "batch.prompts_per_iteration=4",
    "batch.responses_per_prompt=4",
    "batch.mini_batch_prompts=2",
    "batch.max_tokens_per_micro_batch=512",
    "rollout.prompts_in_flight=4",  # as many as are needed: unused ones would differ by timing
    "rollout.max_response_length=64",
    "data.evaluation_size=8",
    "evaluation.samples_per_problem=1",
    "evaluation.every=2",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
)
VICTIMS = ("driver", "trainer rank", "rollout engine", "checkpoint writer")
NOT_COMPARED = (*COSTS, RECOVERY, "engines/", "scorers/")
STARTS = 5
"""Times the command is run before a run counts as lost."""
START_TIMEOUT_S = 900.0
PR_SET_CHILD_SUBREAPER = 36


class Run:
    """The command that trains into one folder, started as often as needed. Its output is appended to a log beside the folder."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.command = [
            sys.executable,
            "-m",
            "megatron_fipo.cli",
            "train",
            CONFIG,
            *TINY,
            *overrides,
            f"run_dir={folder}",
        ]
        self.driver: subprocess.Popen

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.driver = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def wait(self) -> tuple[int, str]:
        """Exit code and last line, when the driver has ended and all its processes are gone."""
        try:
            code = self.driver.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.driver.kill()
            code = self.driver.wait()
        end_descendants()
        lines = self.log.read_text(errors="replace").splitlines()
        return code, next((line.strip() for line in reversed(lines) if line.strip()), "")


@dataclass(frozen=True)
class Drill:
    """The result of one disturbed run."""

    victim: str
    after_s: float
    """From the start of the run to the kill."""
    recovery_s: float
    """From the kill to the next trained iteration, or to the end of the run if none was left."""
    reasons: list[str]
    """Why each start that failed did."""
    differences: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", metavar="N", type=int, help="disturbed runs")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings of all the runs")
    parser.add_argument("--seed", type=int, default=1, help="of victims and moments (default 1)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the runs (default: a temporary one, removed unless a run differs)",
    )
    options = parser.parse_intermixed_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    try:
        failed = drill_all(folder, options.overrides, options.count, random.Random(options.seed))
    finally:
        end_descendants()
    if failed:
        print(f"{failed} of {options.count} runs differ from the undisturbed one; they are in {folder}")
        return 1
    print(f"all {options.count} runs ended with the bits of the undisturbed one")
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


def drill_all(folder: Path, overrides: Sequence[str], count: int, rng: random.Random) -> int:
    """The number of runs that differ."""
    undisturbed = Run(folder / "undisturbed", overrides)
    start = time.monotonic()
    undisturbed.start()
    code, reason = undisturbed.wait()
    if code != 0:
        sys.exit(f"the undisturbed run failed with exit code {code}: {reason}")
    duration = time.monotonic() - start
    print(f"undisturbed: {duration:.1f} s", flush=True)
    failed = 0
    victims: list[str] = []
    for number in range(1, count + 1):
        # Each four runs lose one of each kind.
        victims = victims or rng.sample(VICTIMS, len(VICTIMS))
        run = Run(folder / f"run-{number}", overrides)
        drill = disturbed(run, victims.pop(), undisturbed.folder, duration, rng)
        failed += bool(drill.differences)
        print(
            f"{number:3}  {drill.victim:17}  killed after {drill.after_s:5.1f} s  recovered in {drill.recovery_s:5.1f} s  "
            f"{len(drill.reasons) + 1} starts  {'DIFFERENT' if drill.differences else 'same bits'}",
            *(f"\n       {line}" for line in (*drill.reasons, *drill.differences)),
            flush=True,
        )
    return failed


def disturbed(run: Run, victim: str, undisturbed: Path, duration: float, rng: random.Random) -> Drill:
    """Start a run, kill a `victim`, and run it to its end."""
    moment, pick = rng.uniform(0.0, 0.95 * duration), rng.random()
    while True:
        begin = time.monotonic()
        run.start()
        if kill(victim, run, begin + moment, pick):
            break
        # The run ended before there was such a process: start again and kill earlier.
        run.wait()
        shutil.rmtree(run.folder)
        moment /= 2
    killed, after_s = time.time(), time.monotonic() - begin
    reasons: list[str] = []
    while (ended := run.wait())[0] != 0:
        reasons.append(f"start {len(reasons) + 1} ended with exit code {ended[0]}: {ended[1]}".rstrip(": "))
        if len(reasons) == STARTS:
            return Drill(victim, after_s, time.time() - killed, reasons, [f"not done after {STARTS} starts"])
        run.start()
    later = [
        record.time
        for record in read_metrics(run.folder)
        if record.kind == "iteration" and record.time > killed
    ]
    recovery_s = min(later, default=time.time()) - killed
    return Drill(victim, after_s, recovery_s, reasons, differences(undisturbed, run.folder))


def kill(victim: str, run: Run, moment: float, pick: float) -> bool:
    """Wait from `moment` on for such a process and kill it (of several: by `pick` in [0, 1)). False if the run ends first."""
    while run.driver.poll() is None:
        time.sleep(0.01)
        found = find(victim, run.driver.pid) if time.monotonic() >= moment else []
        if found and end_alive(found[int(pick * len(found))]):
            return True
    return False


def end_alive(process: psutil.Process) -> bool:
    """Kill a process unless it has ended: suspended, it cannot end between the check and the kill."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        if process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
            return True
    return False


def find(victim: str, driver: int) -> list[psutil.Process]:
    """The run's processes of this kind. Ray writes an actor's class into its title; forked writers inherit it."""
    if victim == "driver":
        return [psutil.Process(driver)]
    titles = {process: title for process in descendants() if (title := title_of(process)) is not None}
    ranks = {process.pid for process, title in titles.items() if title.startswith("ray::RankActor")}
    if victim == "rollout engine":
        return [
            process for process, title in titles.items() if title.startswith("ray::") and "Engine" in title
        ]
    with_parents = [(process, parent_of(process)) for process in titles if process.pid in ranks]
    if victim == "trainer rank":
        return [process for process, parent in with_parents if parent not in ranks]
    return [process for process, parent in with_parents if parent in ranks]


def title_of(process: psutil.Process) -> str | None:
    try:
        return " ".join(process.cmdline()) or None
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


def parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def adopt_orphans() -> None:
    """Become the parent of every process that a killed driver leaves, so that these can be found, and no others."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the parent of orphaned processes")


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def end_descendants() -> None:
    """Kill the remaining processes of a run until there are none."""
    while left := descendants():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def differences(one: Path, other: Path) -> list[str]:
    """Differences between the results of two runs, a line each."""
    found = []
    names = sorted({path.name for run in (one, other) for path in (run / "model").glob("*.safetensors")})
    for name in names:
        contents = [
            path.read_bytes() if (path := run / "model" / name).exists() else None for run in (one, other)
        ]
        if contents[0] != contents[1]:
            found.append(f"model/{name} differs")
    if not names:
        found.append("no weights to compare")
    first, second = numbers(one), numbers(other)
    found += [
        f"{kind} {iteration} is in one log only" for kind, iteration in sorted(first.keys() ^ second.keys())
    ]
    for key in sorted(first.keys() & second.keys()):
        different = [
            name
            for name in sorted(first[key].keys() | second[key].keys())
            if first[key].get(name) != second[key].get(name)
        ]
        if different:
            found.append(f"{key[0]} {key[1]} differs in {', '.join(different)}")
    return found


def numbers(run_dir: Path) -> dict[tuple[str, int], dict[str, str]]:
    """Kind and iteration → metrics as text that names every bit."""
    return {
        (record.kind, record.iteration): {
            name: json.dumps(value)
            for name, value in record.values.items()
            if not name.startswith(NOT_COMPARED)
        }
        for record in read_metrics(run_dir)
    }


if __name__ == "__main__":
    sys.exit(main())
