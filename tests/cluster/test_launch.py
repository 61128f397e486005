"""Training by `megatron-fipo launch slurm` and slurm/train.sbatch on a real Slurm."""

import re
import signal
from pathlib import Path

import pytest

from tests.cluster.jobs import (
    BIN,
    ENVIRONMENT,
    ON_CPUS,
    SMALL,
    START_S,
    assert_nothing_left,
    attempt_logs,
    driver,
    job_log,
    launch,
    wait_for,
)
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT, iterations

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _no_interface(monkeypatch):
    """Other tests confine gloo to this machine; jobs inherit the environment."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def is_training(run_dir: Path, after: int = 1) -> bool:
    """Whether an iteration has been logged."""
    return (run_dir / "metrics.jsonl").exists() and len(iterations(run_dir)) >= after


def test_a_job_trains_on_both_nodes_and_leaves_only_its_logs(cluster):
    run_dir = cluster.folder / "both"
    job = launch(cluster, run_dir, "iterations=2", options=(*ON_CPUS, "--preflight=true"))
    wait_for(lambda: (attempt_logs(run_dir, job) / "topology.txt").exists(), "joined nodes")
    token = attempt_logs(run_dir, job) / ".ray_token"
    assert token.stat().st_mode & 0o777 == 0o600
    for node in cluster.names:
        (session,) = cluster.local_folder(node).glob("fipo-*")
        assert session.stat().st_mode & 0o777 == 0o700
    cluster.wait(job, "COMPLETED", timeout=START_S)
    assert len(iterations(run_dir)) == 2
    logs = attempt_logs(run_dir, job)
    assert (run_dir / "logs/latest").resolve() == logs.resolve()
    topology = (logs / "topology.txt").read_text()
    assert topology.splitlines() == [
        f"{name} {cluster.address(name)} 2 CPUs 0 GPUs" for name in cluster.names
    ]
    for node in cluster.names:
        workers = list((logs / "ray" / node).glob("worker-*.out"))
        assert any("RankActor" in path.read_text() for path in workers), f"no rank ran on {node}"
    assert "iteration 2/2" in (logs / "driver.log").read_text()
    assert "2 nodes, no faults" in (logs / "preflight.log").read_text()
    assert {line.split("\t")[1].split(":")[0] for line in (logs / "phases.tsv").read_text().splitlines()} == {
        "preflight of 2 nodes",
        "Ray on the first node, node1",
        "Ray on all 2 nodes",
        "train",
        "end with 0",
    }
    assert_nothing_left(cluster, run_dir)


def test_sbatch_of_the_file_trains_too_and_a_notice_is_followed_by_a_requeue_that_resumes(cluster):
    run_dir = cluster.folder / "notice"
    job = cluster.submit(
        ROOT / "slurm/train.sbatch",
        ROOT / "examples/countdown/fipo.yaml",
        *SMALL,
        f"run_dir={run_dir}",
        "iterations=6",
        options=["--nodes=2", "--exclusive=user", "--cpus-per-task=2", "--gpus-per-node=0"],
        env={**ENVIRONMENT, "VENV": str(BIN.parent), "PREFLIGHT": "false"},
    )
    wait_for(lambda: is_training(run_dir), "iteration")
    cluster.signal(job, "USR1", batch=True)
    cluster.wait_for_requeue(job, 1, timeout=START_S)
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("iteration_*"))
    assert len(saved) == 1
    assert_nothing_left(cluster, run_dir)
    cluster.start_now(job)
    cluster.wait(job, "COMPLETED", timeout=START_S)
    assert len(iterations(run_dir)) == 6
    assert (
        f"resuming from {run_dir}/checkpoints/{saved[0]}"
        in (attempt_logs(run_dir, job, 1) / "driver.log").read_text()
    )
    assert_nothing_left(cluster, run_dir)
    # Requeued once more, it does not train again.
    cluster.exec_on(LOGIN, ["scontrol", "requeue", str(job)])
    cluster.start_now(job)
    wait_for(lambda: cluster.restart_count(job) == 2, "restart")
    ended = cluster.wait(job, "COMPLETED", timeout=60)
    assert ended.exit_code == 0
    assert not attempt_logs(run_dir, job, 2).exists()


def test_a_job_without_progress_is_requeued_n_times_and_says_why(cluster):
    run_dir = cluster.folder / "stuck"
    job = launch(cluster, run_dir, "iterations=3", options=(*ON_CPUS, "--retries=1"))
    for restart in (0, 1):
        wait_for(lambda: driver(cluster, "node1", run_dir), "driver")
        driver(cluster, "node1", run_dir).send_signal(signal.SIGKILL)
        if restart == 0:
            cluster.wait_for_requeue(job, 1, timeout=60)
            cluster.start_now(job)
    ended = cluster.wait(job, "FAILED", timeout=60)
    assert (ended.restarts, ended.exit_code) == (1, 2)
    assert "2 attempts in a row saved nothing new" in job_log(run_dir, job)
    assert_nothing_left(cluster, run_dir)


def test_two_jobs_on_the_same_nodes_do_not_meet(cluster):
    folders = [cluster.folder / name for name in ("one", "two")]
    jobs = [launch(cluster, folder, "iterations=2") for folder in folders]
    for job in jobs:
        cluster.wait(job, "COMPLETED", timeout=2 * START_S)
    claims = set()
    for job, folder in zip(jobs, folders, strict=True):
        logs = attempt_logs(folder, job)
        assert len((logs / "topology.txt").read_text().splitlines()) == 2
        claims.add(re.search(r"claim (\d+)", (logs / "nodes/node1.log").read_text())[1])
        assert_nothing_left(cluster, folder)
    assert len(claims) == 2
    windows = [
        [int(line.split("\t")[0]) for line in (attempt_logs(f, j) / "phases.tsv").read_text().splitlines()]
        for f, j in zip(folders, jobs, strict=True)
    ]
    assert max(w[0] for w in windows) < min(w[-1] for w in windows), "they did not run at the same time"


def test_a_lost_node_is_excluded_from_the_requeued_job(cluster):
    run_dir = cluster.folder / "lost"
    job = launch(cluster, run_dir, "iterations=1000", "recovery.placement_timeout_s=5")
    wait_for(lambda: is_training(run_dir), "iteration")
    cluster.kill_node("node2")
    cluster.wait_for_requeue(job, 1, timeout=START_S)
    record = cluster.exec_on(LOGIN, ["scontrol", "show", "job", str(job)]).stdout
    assert "ExcNodeList=node2" in record
    assert (attempt_logs(run_dir, job) / "bad-nodes").read_text().split() == ["node2"]


def test_a_phase_that_ends_late_names_node_and_phase(cluster):
    run_dir = cluster.folder / "late"
    job = launch(cluster, run_dir, options=(*ON_CPUS, "--start-timeout=1", "--retries=0"))
    cluster.wait(job, "FAILED", timeout=START_S)
    log = job_log(run_dir, job)
    assert re.search("Ray did not start on node1 within 1 s|nodes did not join Ray within 1 s: node", log)
    assert_nothing_left(cluster, run_dir)


def test_a_run_that_the_user_must_fix_is_not_requeued(cluster):
    run_dir = cluster.folder / "broken"
    data = cluster.folder / "broken.jsonl"
    data.write_text('{"prompt": "3,7,5=26:", "reward_model": {"ground_truth": "26"}}\n')
    job = launch(
        cluster,
        run_dir,
        f"data.train_path={data}",
        "data.source=jsonl",
        f"evaluation.sets.held_out={data}",
    )
    ended = cluster.wait(job, "FAILED", timeout=START_S)
    assert (ended.exit_code, ended.restarts) == (2, 0)
    assert "the ground truth '26' of problem 1" in job_log(run_dir, job)


def test_a_folder_that_nodes_do_not_share_is_named(cluster):
    job = launch(cluster, Path("/tmp/run"), options=(*ON_CPUS, "--sbatch-line=--output=slurm-%j.log"))
    ended = cluster.wait(job, "FAILED", timeout=START_S)
    assert ended.exit_code == 2
    assert "put run_dir on a file system that all nodes share" in ended.output.read_text()
