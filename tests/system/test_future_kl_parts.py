"""`python -m tools.future_kl` on real runs: the replay is the run, and a replay that is not is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.metrics_log import METRICS_FILE
from tests.system.conftest import Train
from tests.system.runs import ROOT, check, iterations
from tools.future_kl.run import open_run
from tools.future_kl.samplers import BFLOAT16, BFLOAT16_LOGITS, ENGINE, ONE_STEP_OFF

KEPT = (
    "rollout.dump_every=1",
    "checkpoint.every=1",
    "checkpoint.keep_last=3",
    "evaluation.before_training=false",
)
LIMIT_S = 600.0
"""Of the command, on a machine that is ten times slower than usual."""
LATER = "mini-steps 2 to 2"


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations with two mini-steps each."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(run_dir, *KEPT, "iterations=3")
    return run_dir


def analysed(run_dir: Path, output: Path, *options: str, expect: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.future_kl", str(run_dir), "--output", str(output), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    return check(done, expect)


def rows(result: dict[str, Any], section: str, scope: str) -> list[dict[str, Any]]:
    return [row for row in result[section] if row["scope"] == scope]


@pytest.fixture(scope="module")
def parts(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of all its iterations."""
    output = tmp_path_factory.mktemp("analysed") / "parts"
    analysed(finished, output)
    return output


def test_the_replay_of_a_run_is_the_run(finished, parts):
    result = json.loads((parts / "parts.json").read_text())
    assert (result["iterations"], result["mini_steps"], result["later_scope"]) == ([1, 2, 3], 2, LATER)
    exact = ("policy/loss", "policy/grad_norm")
    for row in result["replay"]:
        tolerance = 0 if row["metric"] in exact else 1e-5
        assert row["replay"] == pytest.approx(row["run"], rel=tolerance, abs=tolerance / 100)
    (first,), (later,) = rows(result, "spread", "mini-step 1"), rows(result, "spread", LATER)
    assert first["log_ratio_std"] == first["future_kl_std"] == 0
    assert later["future_kl_std"] > later["log_ratio_std"] > 0
    metrics = iterations(finished)
    assert first["tokens"] + later["tokens"] == sum(values["policy/tokens"] for values in metrics)
    for number, values in enumerate(metrics, 1):
        (row,) = rows(result, "spread", f"iteration {number}, {LATER}")
        for bound in ("low", "high"):  # a mean over two mini-steps, and 0 in the first
            assert row[f"at_{bound}"] / 2 == pytest.approx(values[f"influence/share_at_{bound}"], abs=1e-6)


def test_other_log_probs_are_those_of_their_policies(parts):
    result = json.loads((parts / "parts.json").read_text())
    found = {row["sampler"]: row for row in rows(result, "samplers", LATER)}
    assert {name: row["iterations"] for name, row in found.items()} == {
        ENGINE: [1, 2, 3],
        BFLOAT16: [1, 2, 3],
        BFLOAT16_LOGITS: [1, 2, 3],
        ONE_STEP_OFF: [2, 3],  # no weights are older than the first
    }
    assert found[ENGINE]["difference_max"] < 1e-4
    assert 1e-4 < found[BFLOAT16]["difference_std"] < found[BFLOAT16_LOGITS]["difference_std"] < 0.1
    assert found[ONE_STEP_OFF]["difference_std"] > 1e-3
    assert "| mini-step 1 | one step off |" in (parts / "parts.md").read_text()


def test_a_run_of_several_ranks_is_replayed_on_one(train, tmp_path):
    train(tmp_path / "run", *KEPT, "iterations=1", "parallel.tensor_model_parallel_size=2")
    analysed(tmp_path / "run", tmp_path / "parts")
    result = json.loads((tmp_path / "parts/parts.json").read_text())
    assert {row["sampler"] for row in result["samplers"]} == {ENGINE, BFLOAT16, BFLOAT16_LOGITS}


def test_a_replay_that_is_not_the_run_is_refused(finished, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(finished, changed, symlinks=True)
    lines = [json.loads(line) for line in (changed / METRICS_FILE).read_text().splitlines()]
    for line in lines:
        if line["kind"] == "iteration" and line["iteration"] == 2:
            line["values"]["policy/entropy"] *= 1.01
    (changed / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = analysed(changed, tmp_path / "parts", "--iterations", "3", "2", expect=2)
    assert done.stderr.splitlines()[-1].startswith("the replay of iteration 2 has policy/entropy ")
    assert not (tmp_path / "parts").exists()


def test_iterations_that_cannot_be_replayed_are_named(finished, tmp_path):
    with pytest.raises(
        UserError, match=r"the run has no iteration 9 in its metrics; train with rollout.dump_every=1"
    ):
        open_run(finished).choose([1, 9])
    part = tmp_path / "run"
    shutil.copytree(finished, part, symlinks=True)
    shutil.rmtree(part / "checkpoints/iteration_000001")
    (part / "rollouts/iteration_000003.parquet").unlink()
    run = open_run(part)
    assert run.choose([]) == [1]
    with pytest.raises(
        UserError, match="there is no checkpoint of iteration 1, from which iteration 2 started"
    ):
        run.choose([2])
    with pytest.raises(UserError, match="iteration 3 was not dumped"):
        run.choose([3])
