"""Drills: a run on two nodes loses a part, recovers by itself or in the next attempt, and keeps the bits of a calm run.

All drills disturb one run, one after another. Each can run alone: `pytest tests/cluster/test_drills.py -m cluster -s -k NAME`.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_fipo.run_dir.metrics_log import Record
from tests.cluster.campaign import ITERATIONS, OPTIONS, POLL_S, SETTINGS, Campaign, Recovered, differences
from tests.cluster.jobs import START_S, assert_nothing_left, job_log, launch, wait_for
from tests.cluster.slurm import SlurmCluster
from tests.system.runs import weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

KILL, STOP = signal.SIGKILL, signal.SIGSTOP


# When: whether the moment has come. Each looks at the run's log and at the titles of its processes.


def generating(run: Campaign) -> bool:
    return bool(run.titled("ray::LocalEngine.generate")) and not run.titled("ray::RankActor.")


def in_rollout(run: Campaign) -> bool:
    return generating(run) and not run.is_evaluating()


def in_evaluation(run: Campaign) -> bool:
    return run.is_evaluating() and generating(run)


def in_update(run: Campaign) -> bool:
    return bool(run.titled("ray::RankActor.train_iteration"))


def in_push(run: Campaign) -> bool:
    return bool(run.titled("ray::RankActor.push_weights"))


def in_save(run: Campaign) -> bool:
    return bool(run.titled("ray::RankActor.start_save"))


def in_write(run: Campaign) -> bool:
    return bool(run.writers(*run.cluster.names))


def in_start(run: Campaign) -> bool:
    return bool(run.titled("ray::RankActor.setup"))


def running(run: Campaign) -> bool:
    return True


# What: breaks something.


def to_rank(number: signal.Signals, node: str) -> Callable[[Campaign], None]:
    return lambda run: run.ranks(node)[-1].send_signal(number)


def kill_writer(run: Campaign) -> None:
    run.writers("node1", "node2")[-1].kill()


def kill_engine(run: Campaign) -> None:
    run.titled("ray::LocalEngine")[0].kill()


def kill_driver(run: Campaign) -> None:
    run.driver().kill()


def kill_ray_node(run: Campaign) -> None:
    for process in run.find(
        lambda words: "megatron_fipo.node.ray_node" in words and "srun" not in words[0], "node2"
    ):
        process.kill()


def kill_raylet(node: str) -> Callable[[Campaign], None]:
    return lambda run: run.find(lambda words: words[0].endswith("/raylet"), node)[0].kill()


def kill_node(node: str) -> Callable[[Campaign], None]:
    return lambda run: run.cluster.kill_node(node)


def preempt(run: Campaign) -> None:
    run.cluster.signal(run.current, "USR1", batch=True)


def cancel(run: Campaign) -> None:
    run.cluster.cancel(run.current)


def requeue(run: Campaign) -> None:
    run.administer("scontrol", "requeue", str(run.current))


def shorten(run: Campaign) -> None:
    """The time limit is one to two minutes from now: Slurm sends the notice of 60 s soon."""
    run.administer("scontrol", "update", f"jobid={run.current}", f"TimeLimit={run.minutes() + 2}")


def refuse_checkpoints(run: Campaign) -> None:
    subprocess.run(["chattr", "+i", run.run_dir / "checkpoints"], check=True)


def fill_tmp(run: Campaign) -> None:
    run.cluster.exec_on("node2", ["dd", "if=/dev/zero", "of=/tmp/full", "bs=1M"], check=False)


def small_tmp(run: Campaign) -> None:
    """Start the run in a new job whose second node has a /tmp of 64 MB."""
    run.begin()
    run.cancel()
    run.cluster.exec_on("node2", ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/tmp"])
    run.submit()
    run.begin()


# The end of a drill. Each waits until the run recovers, and returns the next iteration.


def rebuild(run: Campaign, since: float) -> Record:
    """The driver starts lost ranks again."""
    return run.next_iteration(since, lambda record: record.values["recovery/restarts"] > run.rebuilds)


def next_engine(run: Campaign, since: float) -> Record:
    """The driver starts the engine again; ranks stay."""
    return run.next_iteration(since, lambda record: record.values["engines/restarts"] > 0)


def next_attempt(run: Campaign, since: float, folders: bool = False) -> Record:
    """The job is requeued and resumes. Lost nodes boot again. `folders`: those of Ray may stay for the next attempt."""
    run.cluster.wait_for_requeue(run.current, run.known_restarts + 1, timeout=START_S)
    if run.cluster.running == run.cluster.names:
        assert_nothing_left(run.cluster, run.run_dir, folders)
    run.cluster.start_missing()
    run.admit_all_nodes()
    run.administer("scontrol", "update", f"jobid={run.current}", "TimeLimit=60")
    run.cluster.start_now(run.current)
    return run.resumed_iteration()


def next_attempt_that_removes_folders(run: Campaign, since: float) -> Record:
    return next_attempt(run, since, folders=True)


def next_job(run: Campaign, since: float) -> Record:
    """The job ends and is not requeued. Submitted again it resumes."""
    ended = run.cluster.wait(run.current, "CANCELLED", timeout=60)
    assert ended.restarts == run.known_restarts
    assert_nothing_left(run.cluster, run.run_dir)
    run.submit()
    return run.resumed_iteration()


def refused(run: Campaign, since: float) -> Record:
    """The run ends with 2: the user must act. Submitted again it resumes."""
    ended = run.cluster.wait(run.current, "FAILED", timeout=60)
    assert (ended.exit_code, ended.restarts) == (2, run.known_restarts)
    assert f"{run.run_dir}/checkpoints" in job_log(run.run_dir, run.current)
    assert_nothing_left(run.cluster, run.run_dir)
    allow_checkpoints(run)
    run.submit()
    return run.resumed_iteration()


def continues(run: Campaign, since: float) -> Record:
    """The run is not disturbed."""
    reached = run.iteration()
    record = run.next_iteration(since, lambda record: record.iteration >= reached + 5)
    run.cancel()
    run.cluster.exec_on("node2", ["umount", "/tmp"])
    return record


def allow_checkpoints(run: Campaign) -> None:
    if (folder := run.run_dir / "checkpoints").is_dir():
        subprocess.run(["chattr", "-i", folder], check=True)


@dataclass(frozen=True)
class Drill:
    when: Callable[[Campaign], bool]
    what: Callable[[Campaign], None]
    end: Callable[[Campaign, float], Record]
    begin: Callable[[Campaign], None] = Campaign.begin


DRILLS = {
    "rollout: a rank killed": Drill(in_rollout, to_rank(KILL, "node2"), rebuild),
    "update: a rank killed": Drill(in_update, to_rank(KILL, "node2"), rebuild),
    "push: a rank killed": Drill(in_push, to_rank(KILL, "node1"), rebuild),
    "save: a rank killed": Drill(in_save, to_rank(KILL, "node2"), rebuild),
    "save: a checkpoint writer killed": Drill(in_write, kill_writer, rebuild),
    "evaluation: a rank killed": Drill(in_evaluation, to_rank(KILL, "node2"), rebuild),
    "update: a rank stopped": Drill(in_update, to_rank(STOP, "node2"), rebuild),
    "rollout: the engine killed": Drill(in_rollout, kill_engine, next_engine),
    "evaluation: the engine killed": Drill(in_evaluation, kill_engine, next_engine),
    "rollout: the driver killed": Drill(in_rollout, kill_driver, next_attempt),
    "save: the driver killed": Drill(in_save, kill_driver, next_attempt),
    "start: the driver killed": Drill(in_start, kill_driver, next_attempt, Campaign.begin_again),
    "rollout: ray_node of the second node killed": Drill(
        in_rollout, kill_ray_node, next_attempt_that_removes_folders
    ),
    "update: the raylet of the first node killed": Drill(in_update, kill_raylet("node1"), next_attempt),
    "update: the raylet of the second node killed": Drill(in_update, kill_raylet("node2"), next_attempt),
    "rollout: the second node lost": Drill(in_rollout, kill_node("node2"), next_attempt),
    "update: the second node lost": Drill(in_update, kill_node("node2"), next_attempt),
    "save: the second node lost": Drill(in_save, kill_node("node2"), next_attempt),
    "start: the second node lost": Drill(in_start, kill_node("node2"), next_attempt, Campaign.begin_again),
    "update: the first node lost": Drill(in_update, kill_node("node1"), next_attempt),
    "rollout: notice of preemption": Drill(in_rollout, preempt, next_attempt),
    "time limit": Drill(running, shorten, next_attempt),
    "save: scontrol requeue": Drill(in_save, requeue, next_attempt),
    "update: scancel": Drill(in_update, cancel, next_job),
    "save: checkpoints cannot be written": Drill(running, refuse_checkpoints, refused),
    "/tmp of the second node full": Drill(running, fill_tmp, continues, small_tmp),
}


@pytest.fixture(scope="module")
def calm(two_nodes: SlurmCluster) -> Path:
    """The folder of an undisturbed run."""
    run_dir = two_nodes.folder / "calm"
    two_nodes.wait(launch(two_nodes, run_dir, *SETTINGS, options=OPTIONS), "COMPLETED", timeout=900)
    return run_dir


@pytest.fixture(scope="module")
def campaign(two_nodes: SlurmCluster) -> Iterator[Campaign]:
    """The run that all drills disturb. The table of recoveries is printed at the end."""
    run = Campaign(two_nodes, two_nodes.folder / "drills")
    yield run
    width = max((len(line.drill) for line in run.table), default=0)
    for line in run.table:
        print(
            f"\n{line.drill:{width}}  {line.end:12}  {line.lost_iterations:2} iterations lost  {line.seconds:5.1f} s",
            end="",
        )
    run.abandon()
    allow_checkpoints(run)


@pytest.mark.parametrize("name", DRILLS)
def test_drill(campaign: Campaign, calm: Path, name: str) -> None:
    drill = DRILLS[name]
    try:
        drill.begin(campaign)
        wait_for(lambda: drill.when(campaign), "the moment of the drill", poll_s=POLL_S)
        reached, lost = campaign.iteration(), time.time()
        drill.what(campaign)
        record = drill.end(campaign, lost)
        end, again = drill.end.__name__.replace("_", " "), max(0, reached + 1 - record.iteration)
        campaign.table.append(Recovered(name, end, again, record.time - lost))
        print(f"\n{campaign.table[-1]}")
        assert differences(calm, campaign.run_dir, record.iteration) == []
    except BaseException:
        print(job_log(campaign.run_dir, campaign.current)[-3000:])
        campaign.abandon()
        allow_checkpoints(campaign)
        raise


def test_the_disturbed_run_ends_as_the_calm_one(campaign: Campaign, calm: Path) -> None:
    campaign.begin()
    campaign.cluster.wait(campaign.current, "COMPLETED", timeout=800)
    assert differences(calm, campaign.run_dir, ITERATIONS + 1) == []
    assert weights(calm) == weights(campaign.run_dir)
    assert_nothing_left(campaign.cluster, campaign.run_dir)
