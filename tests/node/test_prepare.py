"""The first and the last step of an attempt, as the batch script runs them."""

import json
import os
import shlex
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.node import after, prepare
from megatron_fipo.node.attempts import progress
from megatron_fipo.node.nodes import add_bad_nodes, bad_nodes
from tests.system.runs import ROOT

CONFIG = "examples/countdown/fipo.yaml"


@pytest.fixture(autouse=True)
def _job(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    monkeypatch.setenv("NCCL_SECRET_KEY", "hush")


def variables(text: str) -> dict[str, str]:
    """What the batch script evaluates."""
    lines = [line for line in text.splitlines() if line.startswith("fipo_")]
    return dict(shlex.split(line)[0].split("=", 1) for line in lines)


def begin(run_dir: Path, *words: str, retries: int = 3, nodes: int = 1) -> int:
    return prepare.main(
        [f"--retries={retries}", f"--nodes={nodes}", "--", "train", CONFIG, f"run_dir={run_dir}", *words]
    )


def end(logs: Path, code: int, retries: int = 3) -> int:
    return after.main([f"--logs={logs}", f"--retries={retries}", f"--code={code}"])


def test_a_job_without_weights_does_not_begin(tmp_path):
    with pytest.raises(UserError, match="has neither"):
        begin(tmp_path / "run", "model.path=examples/qwen2.5-32b")
    assert not (tmp_path / "run").exists()


def save(run_dir: Path, iteration: int) -> None:
    (run_dir / f"checkpoints/iteration_{iteration:06d}").mkdir(parents=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"failures": "3", "is_open": true}',
        '{"failures": 1e999}',
        '{"progress": [1]}',
        '{"is_finished": "no"}',
        "[]",
        "",
        "[" * 100_000,
    ],
)
def test_a_damaged_history_is_refused(tmp_path, content):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/7.json").write_text(content)
    with pytest.raises(UserError, match=r"7\.json is damaged; remove it"):
        begin(tmp_path)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["7.json"]


def test_the_history_is_not_written_through_a_link(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "other").write_text("keep")
    (tmp_path / "logs/7.partial").symlink_to(tmp_path / "other")
    assert begin(tmp_path) == 0
    assert (tmp_path / "other").read_text() == "keep"


def test_a_run_dir_that_the_script_cannot_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="has a line break"):
        begin(tmp_path / "a\nfipo_logs=x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"run_dir {tmp_path}/loop"):
        begin(tmp_path / "loop")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("name", ["SLURM_GPUS_ON_NODE", "SLURM_CPUS_ON_NODE"])
def test_a_number_of_slurm_that_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "gpu:8")
    with pytest.raises(UserError, match=f"{name}='gpu:8' is not a whole number"):
        begin(tmp_path)


def test_options_may_come_before_the_configuration(tmp_path, capsys):
    words = ["--allow-change", "seed", CONFIG, f"run_dir={tmp_path}"]
    assert prepare.main(["--retries=3", "--nodes=1", "--", "train", *words]) == 0
    assert variables(capsys.readouterr().out)["fipo_logs"] == f"{tmp_path}/logs/7-0"


def test_a_checkpoint_that_disappears_is_not_progress(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoints/iteration_000004").symlink_to("absent")
    found = progress(tmp_path)
    assert found is not None
    assert found.startswith("iteration_000003 ")


def test_bad_nodes_may_hold_any_bytes(tmp_path):
    (tmp_path / "bad-nodes").write_bytes(b"n1\n\xff\n")
    assert bad_nodes(tmp_path) == ["n1", "\ufffd"]


def test_an_attempt_has_a_folder_a_token_and_a_link(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "a 'run"
    assert begin(run_dir, "seed=3", "--allow-change", "seed") == 0
    answer = variables(capsys.readouterr().out)
    logs = run_dir / "logs/7-0"
    assert answer == {
        "fipo_finished": "",
        "fipo_logs": str(logs),
        "fipo_token": str(logs / ".ray_token"),
    }
    token = logs / ".ray_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    assert os.readlink(run_dir / "logs/latest") == "7-0"
    environment = (logs / "environment.txt").read_text()
    assert "NCCL_SECRET_KEY=(hidden)" in environment
    assert "hush" not in environment
    assert "SLURM_JOB_ID=7" in environment
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(run_dir) == 0
    assert os.readlink(run_dir / "logs/latest") == "7-1"
    assert not token.exists()


def test_attempts_without_progress_end_the_job(tmp_path, capsys):
    for failures in (1, 2, 3):
        assert begin(tmp_path, retries=2) == 0
        (logs,) = tmp_path.glob("logs/7-*")
        (logs / ".ray_token").unlink()
        assert end(logs, 86, retries=2) == 0
        answer = variables(capsys.readouterr().out)
        assert bool(answer["fipo_requeue"]) == (failures < 3)
    assert answer["fipo_code"] == "2"


def test_a_checkpoint_between_begin_and_end_is_progress_and_lost_nodes_are_excluded(tmp_path, capsys):
    save(tmp_path, 1)
    assert begin(tmp_path, retries=0) == 0
    save(tmp_path, 2)
    logs = tmp_path / "logs/7-0"
    add_bad_nodes(logs, ["n3", "n1"])
    assert end(logs, 86, retries=0) == 0
    answer = variables(capsys.readouterr().out)
    assert (answer["fipo_requeue"], answer["fipo_exclude"]) == ("True", "n1,n3")


def test_a_finished_job_has_nothing_to_do(tmp_path, capsys):
    assert begin(tmp_path) == 0
    assert end(tmp_path / "logs/7-0", 0) == 0
    capsys.readouterr()
    assert begin(tmp_path) == 0
    captured = capsys.readouterr()
    assert variables(captured.out) == {"fipo_finished": "1"}
    assert "the job had finished before it was requeued" in captured.err


def test_a_requeue_by_the_scheduler_without_progress_is_stopped(tmp_path, capsys):
    assert begin(tmp_path, retries=0) == 0
    assert begin(tmp_path, retries=0) == 2
    assert "1 attempt in a row saved nothing new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "nodes", "message"),
    [
        (["parallel.data_parallel_size=8"], 2, "the run needs 9 CPUs"),
        (["seeed=1"], 1, "did you mean 'seed'?"),
    ],
)
def test_an_attempt_that_cannot_work_is_refused(tmp_path, words, nodes, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        begin(tmp_path, *words, nodes=nodes)
    assert not (tmp_path / "logs").exists()


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/7.json").write_text(json.dumps({"failures": 1, "unknown": 2}))
    with pytest.raises(UserError, match=r"logs/7.json is damaged; remove it"):
        begin(tmp_path)


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match=r"run_dir /proc/run/logs"):
        begin(Path("/proc/run"))


def test_an_evaluation_has_its_logs_beside_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["--retries=1", "--nodes=1", "--", "evaluate", "model", "--output", "x.jsonl"]) == 0
    assert variables(capsys.readouterr().out)["fipo_logs"] == str(tmp_path / "runs/evaluation/logs/7-0")
