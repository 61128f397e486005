"""Jobs other than training on a real Slurm: slurm/evaluate.sbatch, slurm/convert.sbatch, and jobs that sbatch refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.jobs import BIN, ENVIRONMENT, ON_CPUS, START_S, assert_nothing_left
from tests.cluster.slurm import Job, SlurmCluster
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT, TINY, command

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
MODEL = ROOT / "examples/countdown/base-model"


def run(cluster: SlurmCluster, script: str, *words: str | Path, nodes: int = 1) -> Job:
    """Run one of the scripts of the package to its end."""
    job = cluster.submit(
        ROOT / "slurm" / script,
        *words,
        options=[f"--nodes={nodes}", "--exclusive=user", "--cpus-per-task=2", "--gpus-per-node=0"],
        env={**ENVIRONMENT, "VENV": str(BIN.parent), "PREFLIGHT": "false"},
    )
    return cluster.wait(job, "COMPLETED", timeout=START_S)


def test_evaluation_of_a_model_on_two_nodes(cluster):
    table = cluster.folder / "evaluated.jsonl"
    config = ROOT / "examples/countdown/fipo.yaml"
    run(cluster, "evaluate.sbatch", MODEL, config, *TINY, "--output", table, nodes=2)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == 8, "the problems of the held-out set"
    (log,) = (cluster.folder / "runs/evaluation/logs/latest").glob("driver.log")
    assert "(8 problems)" in log.read_text()
    assert_nothing_left(cluster, cluster.folder / "runs/evaluation")


def test_conversion_there_and_back_keeps_every_bit(cluster):
    converted, back = cluster.folder / "converted", cluster.folder / "back"
    run(cluster, "convert.sbatch", "to-megatron", MODEL, converted)
    run(cluster, "convert.sbatch", "to-hf", converted, back)
    weights, expected = load_file(back / "model.safetensors"), load_file(MODEL / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert_nothing_left(cluster, cluster.folder)


def test_a_job_that_sbatch_refuses_is_one_sentence(cluster):
    words = ("launch", "slurm", ROOT / "examples/countdown/fipo.yaml", *ON_CPUS, "--partition=absent")
    words = command(*words, f"model.path={MODEL}", f"run_dir={cluster.folder / 'refused'}")
    done = cluster.exec_on(LOGIN, words, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("megatron-fipo: sbatch refused the job: ")
    assert "Invalid partition name specified" in done.stdout
    assert done.stdout.count("\n") == 1
