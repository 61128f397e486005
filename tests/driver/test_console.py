"""The screen: plain rows in a log, a live line on a terminal, a time left that is right."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.driver.console import Console
from megatron_fipo.driver.evaluation_metrics import over_sets

_VALUES = {"reward/mean": -0.25, "accuracy/mean": 0.375, "length/mean": 41.4, "influence/mean": 1.0123}
_SET = {
    "avg_at_k": 0.27,
    "cons_at_k": 0.4,
    "pass_at_k": 0.64,
    "k": 4.0,
    "problems": 150.0,
    "failed": 0.0,
    "length_mean": 29.0,
    "length_median": 25.0,
    "truncated": 0.0,
}
_EVALUATION = over_sets({"countdown": _SET})


def test_a_log_gets_one_plain_line_per_iteration() -> None:
    file = io.StringIO()
    with Console(20, file) as console:
        console.phase("evaluation")
        console.evaluation(0, _EVALUATION)
        for iteration in range(1, 3):
            console.phase("rollout", detail="round 1")
            console.iteration(iteration, _VALUES)
        console.note("[bold]noted[/bold] " + "word " * 40)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert (
        lines[0]
        == "held-out countdown after 0: avg@4 0.270  cons@4 0.400  pass@4 0.640  length 29.0  (150 problems)"
    )
    assert lines[1].startswith(
        "iteration  1/20  reward -0.250  accuracy  0.375  length    41 tokens  influence 1.0123  left "
    )
    assert lines[3].startswith("[bold]noted[/bold] word word")
    assert all(character.isprintable() for line in lines for character in line)


def test_an_evaluation_explains_the_problems_that_it_excludes() -> None:
    file = io.StringIO()
    with Console(20, file) as console:
        console.evaluation(1, over_sets({"countdown": {**_SET, "problems": 149.0, "failed": 1.0}}))
        console.evaluation(2, _EVALUATION)
    excluding, complete = file.getvalue().splitlines()
    assert excluding.endswith("length 29.0  (149 of 150 problems; 1 could not be scored or sampled)")
    assert complete.endswith("length 29.0  (150 problems)")


def test_several_sets_have_a_row_each_and_one_for_their_mean() -> None:
    file = io.StringIO()
    sets = over_sets({"aime24": _SET, "aime2025": {**_SET, "avg_at_k": 0.13, "failed": 2.0}})
    with Console(20, file) as console:
        console.evaluation(5, sets)
        console.summary(sets, sets, None, None)
    rows = [line for line in file.getvalue().splitlines() if line.startswith("held-out")]
    assert [row.partition("  cons")[0] for row in rows] == [
        "held-out aime24         after 5: avg@4 0.270",
        "held-out aime2025       after 5: avg@4 0.130",
        "held-out mean of 2 sets after 5: avg@4 0.200",
    ]
    assert [row.partition("(")[2] for row in rows] == [
        "150 problems)",
        "150 of 152 problems; 2 could not be scored or sampled)",
        "300 of 302 problems; 2 could not be scored or sampled)",
    ]
    cells = [[cell.strip() for cell in line.split("│")] for line in file.getvalue().splitlines()]
    assert [cell[1] for cell in cells if cell[2:3] == ["avg@k"]] == ["aime24", "aime2025", "mean of 2 sets"]
    assert [cell[1] for cell in cells if cell[2:3] == ["response length, median"]] == ["aime24", "aime2025"]


def test_a_second_row_shows_where_the_time_went_and_the_rates() -> None:
    file = io.StringIO()
    costs = {
        "time/total": 40.0,
        "time/rollout": 10.0,
        "time/update": 26.0,
        "time/log": 1.2,
        "time/other": 2.8,
        "throughput/tokens_per_s_per_gpu": 1234.5,
        "throughput/rollout_tokens_per_s_per_gpu": 2345.6,
        "throughput/train_tokens_per_s_per_gpu": 3456.7,
    }
    with Console(3, file) as console:
        console.iteration(1, {**_VALUES, **costs})
        console.iteration(2, {**_VALUES, **costs, "memory/device_gib": 61.0, "mfu/update": 0.412})
        console.iteration(3, {"time/total": 4.0, "time/update": 3.0, "time/other": 1.0})
    rows = file.getvalue().splitlines()
    where, rates = (
        "    40.0 s: update 65%, rollout 25%, other 7%, rest 3%",
        "iteration 1,234, engines 2,346, trainer 3,457",
    )
    assert rows[1] == f"{where}  tokens/s per rank or engine: {rates}"
    assert rows[3] == f"{where}  tokens/s per GPU: {rates}  MFU 41.2%"
    assert rows[5] == "    4.0 s: update 75%, other 25%, rest 0%"


def test_the_last_iteration_has_no_time_left() -> None:
    """An evaluation and the saving of the model may follow, which nothing predicts."""
    file = io.StringIO()
    with Console(2, file) as console:
        console.phase("rollout")
        console.iteration(1, _VALUES)
        console.iteration(2, _VALUES)
    assert ["left" in row for row in file.getvalue().splitlines()] == [True, False]


def test_color_forced_by_the_environment_does_not_reach_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with Console(1, file) as console:
        console.phase("rollout")
        console.iteration(1, _VALUES)
        console.summary(_EVALUATION, _EVALUATION, Path("r"), Path("m"))
    assert "\x1b" not in file.getvalue()


def test_missing_and_non_finite_values_are_not_numbers() -> None:
    file = io.StringIO()
    with Console(2, file) as console:
        console.iteration(1, {"reward/mean": float("nan")})
        console.evaluation(1, {})
    first, second = file.getvalue().splitlines()
    assert first.split() == ["iteration", "1/2", "reward", "-", "left", "-"]
    assert second == "held-out problems after 1: avg@- -  cons@- -  pass@- -  length -  (- problems)"


def test_time_left_follows_recent_iterations_and_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console(100, io.StringIO())
    console.phase("evaluation")
    now += 1000
    console.phase("rollout")
    assert console.seconds_left is None
    for iteration in range(41, 51):  # resumed after 40
        now += 5
        console.iteration(iteration, _VALUES)
    assert console.seconds_left == pytest.approx(5 * 50)
    for iteration in range(51, 61):
        now += 20
        console.iteration(iteration, _VALUES)
    assert console.seconds_left == pytest.approx(20 * 40)


def test_the_summary_compares_and_keeps_paths_in_one_piece(tmp_path: Path) -> None:
    file = io.StringIO()
    report = tmp_path / ("long_" * 20) / "report.html"
    with Console(1, file) as console:
        console.summary(
            {"evaluation/avg_at_k": 0.25, "evaluation/length_mean": 30.0},
            {"evaluation/avg_at_k": 0.5, "evaluation/length_mean": 20.0},
            report,
            Path("model"),
        )
    text = file.getvalue()
    rows = {
        cells[2].strip(): [cell.strip() for cell in cells[3:6]]
        for line in text.splitlines()
        if len(cells := line.split("│")) == 7
    }
    assert rows == {"avg@k": ["0.250", "0.500", "+0.250"], "response length, mean": ["30.0", "20.0", "-10.0"]}
    assert f"report {report}" in text.splitlines()
    assert "model  model" in text.splitlines()


def test_a_summary_of_an_interrupted_run_shows_what_there_is() -> None:
    file = io.StringIO()
    Console(1, file).summary(None, None, None, Path("model"))
    assert file.getvalue() == "model  model\n"


def test_a_terminal_sees_the_phase_at_work() -> None:
    program = """
import time
from megatron_fipo.driver.console import Console
with Console(7) as console:
    console.phase("old log-probs", detail="3 micro-batches")
    time.sleep(0.6)
    console.iteration(1, {"reward/mean": 0.5})
"""
    driver, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=terminal, env={**os.environ, "TERM": "xterm-256color"}
    )
    os.close(terminal)
    output = b""
    try:
        while piece := os.read(driver, 4096):
            output += piece
    except OSError:  # Linux reports the other side's end so
        pass
    os.close(driver)
    assert process.wait() == 0
    text = output.decode()
    assert "old log-probs" in text
    assert "3 micro-batches" in text
    assert "reward +0.500" in text
    assert "\x1b[?25h" in text  # the cursor is given back


def test_a_log_gets_the_progress_of_a_long_phase_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    file = io.StringIO()
    console = Console(100, file)
    for _ in range(2):
        console.phase("rollout")
        for second in range(600):
            now += 1
            console.progress(f"{second} of 600")
        console.phase("update")
    lines = file.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"rollout for {minutes} min 00 s" for minutes in (1, 2, 4, 8)
    ] * 2
    assert lines[0].endswith(": 59 of 600")
