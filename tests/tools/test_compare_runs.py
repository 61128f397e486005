"""Runs are compared over seeds, and only if the comparison is meaningful."""

import statistics
from pathlib import Path

import pytest

from tests.report.synthetic_run import write_synthetic_run
from tools import compare_runs


def test_the_table_has_mean_and_spread_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_synthetic_run(tmp_path / f"{objective}-{seed}", objective, iterations=10, seed=seed)
        for objective in ("grpo", "fipo")
        for seed in (1, 2, 3)
    ]
    assert compare_runs.main([*map(str, runs), "--out", str(tmp_path / "out" / "countdown")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        [name, "1, 2, 3", iteration] for name in ("fipo", "grpo") for iteration in ("0", "10")
    ]

    after = [
        compare_runs.load(run).run.evaluations()[-1].values["evaluation/avg_at_k"]
        for run in runs
        if "fipo" in run.name
    ]
    assert rows[1][3] == f"{statistics.fmean(after):.3f} ± {statistics.stdev(after):.3f}"
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"countdown.svg", "countdown.png", "countdown.table.md"}
    assert all(written.values())


def test_a_curve_covers_the_iterations_that_all_seeds_have(tmp_path: Path) -> None:
    short = compare_runs.load(write_synthetic_run(tmp_path / "a", iterations=5, seed=1))
    long = compare_runs.load(write_synthetic_run(tmp_path / "b", iterations=10, seed=2))
    iterations, mean, spread = compare_runs.curve([short, long], "evaluation/avg_at_k")
    assert iterations == [0, 5]
    values = [run.run.series("evaluation/avg_at_k")[5] for run in (short, long)]
    assert (mean[1], spread[1]) == pytest.approx((statistics.fmean(values), statistics.stdev(values)))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({"seed": 1}, {"seed": 1}, "b repeats fipo with seed 1"),
        ({"seed": 1}, {"seed": 2, "lr": 1.0}, "differ in optimizer.lr"),
        ({"seed": 1}, {"seed": 2, "iterations": 6}, "differ in iterations"),
    ],
)
def test_runs_that_can_not_be_compared_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: dict,
    second: dict,
    reason: str,
) -> None:
    runs = [
        write_synthetic_run(tmp_path / name, **{"iterations": 5, **settings})
        for name, settings in (("a", first), ("b", second))
    ]
    assert compare_runs.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_runs.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no metrics" in capsys.readouterr().err
