"""The comparison with TRL: from logs to the table, the commands of both systems, and the memory of a process tree."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.run_dir.metrics_log import MetricsLog, read_metrics
from tools.bench import process_tree
from tools.bench.harness import ROOT
from tools.bench.trl_countdown import CONFIG, OURS, TRL, Comparison, command, measure, page, result, rows

OPTIONS = Namespace(
    iterations=3,
    threads=2,
    trl_python=Path("python-of-trl"),
    plain_generate=False,
    overrides=["rollout.top_p=0.9"],
)


def log_of(folder: Path, rollouts: list[float], accuracies: list[float]) -> None:
    """Iterations whose other phases take a second each, an evaluation of 7 s before the last one."""
    log = MetricsLog(folder)
    log.log("evaluation", 0, {"evaluation/avg_at_k": accuracies[0], "evaluation/length_mean": 40.0})
    for number, rollout in enumerate(rollouts, 1):
        evaluation = 7.0 if number == len(rollouts) else 0.0
        log.log(
            "iteration",
            number,
            {
                "time/total": rollout + 3 + evaluation,
                "time/rollout": rollout,
                "time/old_log_probs": 1.0,
                "time/update": 1.0,
                "time/evaluation": evaluation,
                "time/checkpoint": 0.0,
                "tokens/used": 1000.0 * (rollout + 3),
                "rollout/prompts": 24.0 + number,
                "groups/all_right": 1.0,
                "groups/all_wrong": number - 1.0,
            },
        )
    log.log("evaluation", 5, {"evaluation/avg_at_k": accuracies[1], "evaluation/length_mean": 80.0})


def test_the_table_is_that_of_the_logs(tmp_path):
    log_of(tmp_path / "ours", [50.0, 1.0, 2.0, 4.0], [0.25, 0.5])
    log_of(tmp_path / "again", [50.0, 2.0], [0.35, 0.5])
    log_of(tmp_path / "theirs", [90.0, 7.0], [0.25, 0.375])
    gib = 2**30
    runs = [
        result(OURS, 1, 0.5, process_tree.Ended(0, 60.0, 2 * gib), read_metrics(tmp_path / "ours")),
        result(TRL, 1, 0.5, process_tree.Ended(0, 99.0, gib), read_metrics(tmp_path / "theirs")),
        result(OURS, 2, 0.5, process_tree.Ended(0, 60.0, 3 * gib), read_metrics(tmp_path / "again")),
    ]
    table = {name: cells for name, *cells in rows(runs)}
    assert table["seconds per iteration"] == ["5.00 (4.00 to 7.00)", "10.00", "2.00"]
    assert table["of it rollout and scores"] == ["2.00 (1.00 to 4.00)", "7.00", "3.50"]
    assert table["of it the rest"] == ["1.00 (1.00 to 1.00)", "1.00", "1.00"]
    assert table["tokens per second"] == ["1,000 (1,000 to 1,000)", "1,000", "1.00"]
    assert table["prompts sampled"][0] == "26 (26 to 28)"
    assert table["groups all right or all wrong"] == ["2 (2 to 4)", "2", "0.80"]
    assert table["peak memory, GiB"] == ["3.00", "1.00", "0.33"]
    assert table["held-out accuracy, iteration 0"] == ["0.300", "0.250", "0.83"]
    assert table["held-out accuracy, iteration 5"] == ["0.500", "0.375", "0.75"]
    assert table["held-out response length, iteration 5"] == ["80.0", "80.0", "1.00"]


def test_the_page_names_versions_and_settings(tmp_path):
    log_of(tmp_path, [1.0, 1.0], [0.25, 0.5])
    runs = [
        result(system, 1, 0.5, process_tree.Ended(0, 60.0, 1), read_metrics(tmp_path))
        for system in (OURS, TRL)
    ]
    shown = page(Comparison("a machine", ["seed=1"], {OURS: {"torch": "2.13"}, TRL: {"trl": "1.16"}}, runs))
    assert shown.startswith(f"a machine\n\n- {CONFIG} seed=1\n- {OURS}: torch 2.13\n- {TRL}: trl 1.16\n\n")
    assert f"| {OURS} | {TRL} 1.16 | {TRL} / {OURS} |" in shown


def test_both_systems_get_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = {system: command(system, OPTIONS, 7, tmp_path / "run") for system in (OURS, TRL)}
    assert words[TRL][0] == "python-of-trl"
    loaded = {system: load_config(CONFIG, each[each.index(CONFIG) + 1 :]) for system, each in words.items()}
    assert loaded[OURS].parallel.data_parallel_size == loaded[OURS].rollout.num_engines == OPTIONS.threads
    loaded[OURS].parallel, loaded[OURS].rollout.num_engines = loaded[TRL].parallel, 1
    assert loaded[OURS] == loaded[TRL]
    assert (loaded[TRL].seed, loaded[TRL].iterations, loaded[TRL].rollout.top_p) == (7, 3, 0.9)
    assert loaded[TRL].objective.name == "dapo"
    plain = command(TRL, Namespace(**{**vars(OPTIONS), "plain_generate": True}), 7, tmp_path / "run")
    assert set(plain) - set(words[TRL]) == {"--plain-generate"}


def test_memory_counts_what_descends_from_a_process(tmp_path):
    megabytes = 200
    child = f"held = b'x' * ({megabytes} << 20); import time; time.sleep(3)"
    parent = (
        f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode + 3)"
    )
    ended = process_tree.run([sys.executable, "-c", parent], tmp_path / "log", {}, tmp_path)
    assert ended.code == 3
    assert ended.seconds > 3
    assert megabytes < ended.peak_bytes / 2**20 < megabytes + 100


def test_memory_of_a_process_that_has_ended_is_none():
    assert process_tree.tree_bytes(2**22 + 1) == 0


def test_a_run_that_fails_ends_the_comparison_with_what_it_printed():
    options = Namespace(
        **{**vars(OPTIONS), "trl_python": Path(sys.executable), "overrides": ["no.such_key=1"]}
    )
    with pytest.raises(SystemExit, match="TRL ended with 1"):
        measure(TRL, options, 1)
