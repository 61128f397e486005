"""One training run on a Slurm cluster that is disturbed again and again, and compared with one that is not."""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_fipo.run_dir.metrics_log import Record, read_metrics
from tests.cluster.jobs import START_S, assert_nothing_left, attempt_logs, driver, job_log, launch, wait_for
from tests.cluster.slurm import ENDED, SlurmCluster
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import BY_TIMING

ITERATIONS = 110
"""Of the run. Each drill lasts some."""
EVALUATE_EVERY = 4
SETTINGS = (
    "deterministic=true",
    f"iterations={ITERATIONS}",
    "checkpoint.every=1",
    "checkpoint.keep_last=2",
    f"evaluation.every={EVALUATE_EVERY}",
    "rollout.prompts_in_flight=4",  # as many as are needed: unused ones would differ by timing
    "rollout.timeout_s=120",
    "recovery.stall_timeout_s=40",
    "recovery.placement_timeout_s=5",
)
OPTIONS = (
    "--nodes=2",
    "--gpus-per-node=0",
    "--cpus-per-node=2",
    "--preflight=false",
    "--time=60",
    "--signal-notice=60",
)
"""Three ranks and an engine on two nodes of two CPUs: ranks on both."""
RANK = "ray::RankActor"
"""Title of a trainer rank's process."""
POLL_S = 0.02
LEAD = 1
"""Iterations that a run completes before it is disturbed again."""


@dataclass(frozen=True)
class Recovered:
    """One line of the table at the end."""

    drill: str
    end: str
    lost_iterations: int
    seconds: float
    """From the loss to the end of the next iteration."""


class Campaign:
    """A run and the job that it runs in. What a drill needs to see, to break and to wait for."""

    def __init__(self, cluster: SlurmCluster, run_dir: Path) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.job: int | None = None
        self.table: list[Recovered] = []
        self.known_restarts = 0
        """Of the job, before the drill."""
        self.rebuilds = 0.0
        """Of the run, before the drill."""

    def begin(self) -> None:
        """Let the job run, and complete some iterations since the last drill."""
        if self.job is None or self.cluster.state(self.job) in ENDED:
            self.submit()
        goal = self.iteration() + LEAD
        self.wait_for(lambda: self.iteration() >= goal and self.log(), "next iterations")
        self.known_restarts = self.restarts()
        last = next(record for record in reversed(self.records()) if record.kind == "iteration")
        self.rebuilds = last.values["recovery/restarts"]

    def begin_again(self) -> None:
        """As `begin`, and then start the run in a new job."""
        self.begin()
        self.cancel()
        self.submit()
        self.known_restarts = 0

    def abandon(self) -> None:
        """After a drill that failed: the next one begins with a new job on nodes without remains."""
        self.cluster.cancel_all()
        self.cluster.start_missing()
        for node in self.cluster.names:
            for folder in self.cluster.local_folder(node).glob("fipo-*"):
                shutil.rmtree(folder)
        self.job = None

    # The job

    @property
    def current(self) -> int:
        """The number of the job."""
        assert self.job is not None
        return self.job

    def submit(self) -> None:
        self.job = launch(self.cluster, self.run_dir, *SETTINGS, options=OPTIONS)

    def cancel(self) -> None:
        self.cluster.cancel(self.current)
        self.cluster.wait(self.current, "CANCELLED", timeout=60)
        assert_nothing_left(self.cluster, self.run_dir)

    def admit_all_nodes(self) -> None:
        """Let the requeued job use the nodes that its last attempt has excluded, as an administrator who has repaired them."""
        log = attempt_logs(self.run_dir, self.current, self.restarts() - 1) / "job.log"
        if excluded := re.search(r" requeue without (\S+)$", log.read_text(errors="replace"), re.MULTILINE):
            show = ["scontrol", "show", "job", "--oneliner", str(self.current)]
            wait_for(
                lambda: f" ExcNodeList={excluded[1]} " in self.cluster.exec_on(LOGIN, show).stdout,
                f"exclusion of {excluded[1]}",
            )
            self.administer("scontrol", "update", f"jobid={self.current}", "ExcNodeList=")

    def restarts(self) -> int:
        return self.cluster.restart_count(self.current)

    def logs(self) -> Path:
        """Of the attempt that runs."""
        return attempt_logs(self.run_dir, self.current, self.restarts())

    def log(self) -> str:
        """What the driver has printed in the attempt that runs."""
        path = self.logs() / "driver.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def minutes(self) -> int:
        """For which the attempt has run."""
        began = int((self.logs() / "phases.tsv").read_text().split("\t")[0])
        return int((time.time() - began) // 60)

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = START_S) -> None:
        """Wait for a condition of the run. Fails at once if the job has ended."""

        def met() -> bool:
            assert self.cluster.state(self.current) not in ENDED, (
                f"waiting for {what}: {self.cluster.job(self.current)}\n{job_log(self.run_dir, self.current)[-6000:]}"
            )
            return bool(condition())

        wait_for(met, what, timeout)

    # The run

    def records(self) -> list[Record]:
        return read_metrics(self.run_dir)

    def iteration(self) -> int:
        """The last that was logged; 0 before the first."""
        return max((record.iteration for record in self.records()), default=0)

    def next_iteration(self, after: float, test: Callable[[Record], bool] = lambda _: True) -> Record:
        """Wait for an iteration that is logged later than `after` (`time.time()`) and passes the test."""
        found: list[Record] = []

        def look() -> bool:
            found[:] = [
                record
                for record in self.records()
                if record.kind == "iteration" and record.time > after and test(record)
            ]
            return bool(found)

        self.wait_for(look, "next iteration")
        return found[0]

    def resumed_iteration(self) -> Record:
        """Wait for the first iteration of an attempt that resumes."""
        self.wait_for(lambda: "resuming from" in self.log(), "resumed run")
        return self.next_iteration(self.driver().create_time())

    def is_evaluating(self) -> bool:
        """Whether the weights after the last iteration will be evaluated, and are not yet."""
        records = self.records()
        return (
            bool(records) and records[-1].kind == "iteration" and records[-1].iteration % EVALUATE_EVERY == 0
        )

    # Its processes

    def titled(self, start: str, *nodes: str) -> list[psutil.Process]:
        """Processes on nodes (default: all) by the title that Ray gives them: `ray::Class.method` while it runs."""
        return self.find(lambda words: words[0].startswith(start), *nodes)

    def ranks(self, node: str) -> list[psutil.Process]:
        """Trainer ranks on a node, without the checkpoint writers that they fork."""
        found = self.titled(RANK, node)
        pids = {process.pid for process in found}
        return [process for process in found if _parent(process) not in pids]

    def writers(self, *nodes: str) -> list[psutil.Process]:
        """Checkpoint writers, which ranks fork."""
        found = self.titled(RANK, *nodes)
        pids = {process.pid for process in found}
        return [process for process in found if _parent(process) in pids]

    def find(self, test: Callable[[list[str]], bool], *nodes: str) -> list[psutil.Process]:
        """Processes on nodes (default: all) whose command line passes the test."""
        found = []
        for node in nodes or self.cluster.names:
            for process in self.cluster.processes(node):
                with suppress(psutil.Error):
                    words = process.cmdline()
                    if words and test(words):
                        found.append(process)
        return found

    def driver(self) -> psutil.Process:
        """The process of `megatron-fipo train`, on the first node."""
        process = driver(self.cluster, "node1", self.run_dir)
        assert process is not None
        return process

    def administer(self, *command: str) -> None:
        """Run a command on the login node."""
        self.cluster.exec_on(LOGIN, command)


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def differences(calm: Path, run_dir: Path, until: int) -> list[str]:
    """Metrics of the iterations up to `until`, and of the evaluations before its own, that are not equal bit for bit."""
    one, other = (
        {
            (record.kind, record.iteration): {
                name: repr(value)
                for name, value in record.values.items()
                if not name.startswith((*BY_TIMING, "engines/", "scorers/"))
            }
            for record in read_metrics(folder)
            if record.iteration < until + (record.kind == "iteration")
        }
        for folder in (calm, run_dir)
    )
    found = [f"{kind} {number} is in one log only" for kind, number in sorted(one.keys() ^ other.keys())]
    for key in sorted(one.keys() & other.keys()):
        names = sorted(
            name for name in one[key].keys() | other[key].keys() if one[key].get(name) != other[key].get(name)
        )
        if names:
            found.append(f"{key[0]} {key[1]} differs in {', '.join(names)}")
    return found
