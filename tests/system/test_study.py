"""`megatron-fipo study` on real tiny runs: complete ones are skipped, failed and interrupted ones continue, one at a time per folder."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest

from megatron_fipo.run_dir.lock import RunLock
from megatron_fipo.study.outcome import StudyFolder
from tests.system.runs import LONGEST_S, TINY, ended, iterations, run, run_here, start

SHORT = [*TINY, "iterations=1", "data.evaluation_size=4"]


def _write(path: Path, *arms: str, overrides: list[str], seeds: str = "[1]", more: str = "") -> Path:
    path.write_text(
        f"name: tiny\noutput_dir: {path.parent / 'out'}\ntasks: {{countdown: examples/countdown/fipo.yaml}}\n"
        f"overrides: {json.dumps(overrides)}\narms:\n"
        + "".join(f"  {arm}\n" for arm in arms)
        + f"seeds: {seeds}\n{more}"
    )
    return path


def _table(study: Path) -> dict[str, dict[str, str]]:
    with (study.parent / "out/results.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_a_study_with_a_run_that_fails(tmp_path: Path, cluster_of_runs: str) -> None:
    """The failed run is recorded with its reason. The same command skips the complete one and tries the other again."""
    study = _write(
        tmp_path / "study.yaml",
        "good: {}",
        "bad: {overrides: ['reward.name=no_such_module:score']}",
        overrides=[*SHORT, f"ray_address={cluster_of_runs}"],
        more="parallel_runs: 2\n",
    )
    first = run_here("study", study, expect=2)
    assert "countdown-good-seed1: complete" in first.stderr
    assert "1 of 2 runs are not complete, for example countdown-bad-seed1: " in first.stderr
    table = _table(study)
    good, bad = table["countdown-good-seed1"], table["countdown-bad-seed1"]
    assert (good["status"], bad["status"]) == ("complete", "failed")
    assert "no_such_module" in bad["reason"]
    assert good["accuracy@0"]
    assert good["accuracy@1"] == good["accuracy"]
    assert good["version.ray"]
    run_dir = StudyFolder(tmp_path / "out").run_dir("countdown-good-seed1")
    logged = iterations(run_dir)[0]
    assert float(good["entropy"]) == pytest.approx(logged["policy/entropy"], rel=1e-5)
    assert float(good["tokens_trained"]) == logged["tokens/used"]

    before = (run_dir / "metrics.jsonl").stat().st_mtime_ns
    again = run_here("study", study, expect=2)
    assert "1 of 2 runs are complete already" in again.stderr
    assert "countdown-good-seed1: started" not in again.stderr
    assert "countdown-bad-seed1: started" in again.stderr
    assert (run_dir / "metrics.jsonl").stat().st_mtime_ns == before

    changed = run_here("study", study, "arms.good.overrides=[iterations=2]", expect=2)
    assert "countdown-good-seed1 was made with other settings (iterations)" in changed.stderr

    manifest = next((run_dir / "checkpoints").glob("iteration_*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"ray": "', '"ray": "0.'))
    mixed = run_here("study", study, expect=2)
    assert "has runs of other versions than this process (ray 0." in mixed.stderr


def test_nothing_runs_if_a_combination_is_impossible_or_the_folder_is_in_use(tmp_path: Path) -> None:
    study = _write(
        tmp_path / "study.yaml", "a: {}", "b: {overrides: [batch.mini_batch_prompts=3]}", overrides=SHORT
    )
    refused = run_here("study", study, expect=2)
    assert "task countdown, arm b: batch." in refused.stderr
    assert not (tmp_path / "out").exists()

    (tmp_path / "out").mkdir()
    lock = RunLock(tmp_path / "out")
    try:
        in_use = run_here("study", study, "arms.b=null", expect=2)
    finally:
        lock.release()
    assert "choose another output_dir" in in_use.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path: Path) -> None:
    study = _write(
        tmp_path / "study.yaml", "a: {}", overrides=SHORT, seeds="[1, 2]", more="quick: {seeds: [7]}\n"
    )
    assert run_here("study", study, "--dry-run").stdout.splitlines()[:2] == [
        "countdown-a-seed1",
        "countdown-a-seed2",
    ]
    quick = run_here("study", study, "--dry-run", "--quick").stdout
    assert quick == f"countdown-a-seed7\n1 runs in {tmp_path / 'out'}-quick, 1 at one time\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the YAML file of a study, or --report"),
        (["a.yaml", "--output", "x"], "--output is of --report"),
        (["a.yaml", "--report", "x"], "give it without STUDY"),
        (["--report", "x"], "needs --output"),
    ],
)
def test_arguments_that_contradict_each_other(arguments: list[str], message: str) -> None:
    assert message in run_here("study", *arguments, expect=2).stderr


@pytest.mark.slow
def test_an_interrupted_study_continues(tmp_path: Path) -> None:
    """Two runs at one time, each on a Ray cluster of its own; Ctrl-C stops both, and the same command completes them."""
    study = _write(
        tmp_path / "study.yaml",
        "fipo: {}",
        "dapo: {overrides: [objective.name=dapo]}",
        overrides=[*TINY, "iterations=6", "checkpoint.every=0"],
        more="parallel_runs: 2\n",
    )
    folder = StudyFolder(tmp_path / "out")
    names = ("countdown-fipo-seed1", "countdown-dapo-seed1")
    process = start("study", study)
    deadline = time.monotonic() + LONGEST_S
    while not all((folder.run_dir(name) / "metrics.jsonl").exists() for name in names):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    assert stopped.returncode == 130, stopped.stdout
    assert {folder.outcome(name).status for name in names} == {"stopped"}
    done = {name: len(iterations(folder.run_dir(name))) for name in names}
    assert all(count < 6 for count in done.values())

    run("study", study)
    assert {folder.outcome(name).status for name in names} == {"complete"}
    for name in names:
        assert len(iterations(folder.run_dir(name))) == 6
    found = json.loads((tmp_path / "out/results.json").read_text())
    accuracy = next(row for row in found["differences"] if row["measure"] == "accuracy")
    final = {row["arm"]: row["accuracy"] for row in found["runs"]}
    assert accuracy["mean"] == pytest.approx(final["fipo"] - final["dapo"])
    assert accuracy["paired_by"] == "seeds and problems"


@pytest.mark.slow
def test_a_run_at_its_time_limit_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    study = _write(
        tmp_path / "study.yaml",
        "long: {overrides: [iterations=500]}",
        "short: {}",
        overrides=SHORT,
        more="time_limit_minutes: 1.5\n",
    )
    run("study", study, expect=2)
    table = _table(study)
    assert table["countdown-long-seed1"]["reason"] == "not complete after time_limit_minutes=1.5"
    assert table["countdown-short-seed1"]["status"] == "complete"
