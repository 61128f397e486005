"""A run launched by NeMo-Run, as a job and on one machine, is the run of the batch script."""

import os
from pathlib import Path

import pytest

from tests.cluster.jobs import BIN, ON_CPUS, SMALL, attempt_logs, launch
from tests.cluster.slurm import SlurmCluster
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT, iterations

LAUNCH_BIN = ROOT / ".venv-launch/bin"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (LAUNCH_BIN / "nemo").exists(), reason="needs the environment of make venv-launch"
    ),
]
SAME = ("parallel.data_parallel_size=2", "deterministic=true")
"""A layout that one machine of two cores has, too."""
TRAINED = ("policy/", "influence/", "length/", "reward/", "tokens/used")
"""Figures of an iteration that do not depend on time, as the number of tokens sampled for nothing does."""


def nemo_run(cluster: SlurmCluster, run_dir: Path, *options: str, steps: int = 2) -> str:
    """`megatron-fipo launch nemo-run` on the login node, in the environment of NeMo-Run; returns its output."""
    words = [
        *(LAUNCH_BIN / "megatron-fipo", "launch", "nemo-run", f"{ROOT}/examples/countdown/fipo.yaml"),
        *(f"--venv={BIN.parent}", "--name=test", *ON_CPUS, *options),
        *(*SMALL, f"run_dir={run_dir}", *SAME, f"iterations={steps}"),
    ]
    env = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{LAUNCH_BIN}:{os.environ['PATH']}",
        "NEMORUN_HOME": str(cluster.folder / "nemo"),
    }
    return cluster.exec_on(LOGIN, words, env=env, timeout=400).stdout


def job_of(run_dir: Path) -> int:
    """The job that trains there, from the folder of its first attempt."""
    (folder,) = run_dir.glob("logs/*-0")
    return int(folder.name.split("-")[0])


def figures(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name.startswith(TRAINED)}
        for record in iterations(run_dir)
    ]


def test_nemo_run_trains_as_the_batch_script_does(cluster):
    by_sbatch, by_job, here = (cluster.folder / name for name in ("by_sbatch", "by_job", "here"))
    first = launch(cluster, by_sbatch, *SAME, "iterations=2")
    cluster.wait(first, "COMPLETED", timeout=400)

    printed = nemo_run(cluster, by_job, "--dry-run")
    assert "#SBATCH --nodes=2" in printed
    assert not (by_job / "checkpoints").exists()
    nemo_run(cluster, by_job)
    cluster.wait_until(lambda: list(by_job.glob("logs/*-0")), "attempt", 120)
    second = job_of(by_job)
    cluster.wait(second, "COMPLETED", timeout=400)
    assert "iteration 2/2" in (attempt_logs(by_job, second) / "driver.log").read_text()

    nemo_run(cluster, here, "--local")
    assert figures(by_sbatch)[0]
    assert figures(by_sbatch) == figures(by_job) == figures(here)


def test_the_notice_reaches_a_run_inside_the_step_of_nemo_run(cluster):
    run_dir = cluster.folder / "notice_nemo"
    nemo_run(cluster, run_dir, steps=1000)
    metrics = run_dir / "metrics.jsonl"
    cluster.wait_until(lambda: metrics.exists() and iterations(run_dir), "iteration", 300)
    job = job_of(run_dir)
    cluster.signal(job, "USR1")
    cluster.wait_for_requeue(job, 1, timeout=300)
    assert list(run_dir.glob("checkpoints/iteration_*"))
    log = attempt_logs(run_dir, job)
    assert "the job is requeued" in (log / "job.log").read_text()
    assert "\x1b" not in (log / "driver.log").read_text(), "the driver wrote to a terminal"
