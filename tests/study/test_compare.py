"""Runs become arms; means, differences and tables hold what is in the runs' files."""

import csv
import io
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir import evaluation_table
from megatron_fipo.run_dir.metrics_log import MetricsLog
from megatron_fipo.study.compare import Comparison, Difference
from megatron_fipo.study.evaluations import Problem, read_evaluation
from megatron_fipo.study.outcome import Outcome
from megatron_fipo.study.problems import problem_values
from megatron_fipo.study.results import ACCURACY, MEASURES, gains, means_of_curve, version_differences
from megatron_fipo.study.table import differences_table, means_table, rows, to_csv, to_json, to_markdown
from megatron_fipo.study.write import read_comparison, write_results
from tests.study.synthetic_study import PROBLEMS, VERSIONS, write_run, write_study


def _read(*folders: Path, allow: bool = False) -> Comparison:
    return read_comparison(folders, allow_mixed_versions=allow)


def _accuracies(run_dir: Path) -> dict[Problem, float]:
    return problem_values(read_evaluation(run_dir, 20))[ACCURACY]


def _difference(comparison: Comparison, first: str, second: str, column: str) -> Difference:
    return next(
        found
        for found in comparison.differences
        if (found.first.label, found.second.label, found.measure.column) == (first, second, column)
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), gains={"grpo": 0.5}).path


def test_a_mean_is_that_of_the_last_evaluation_over_seeds(study: Path) -> None:
    comparison = _read(study)
    final = [
        result.run.evaluations()[-1].values
        for result in comparison.results
        if result.arm == "dapo" and result.run
    ]
    mean = next(m for m in comparison.means if m.variant.label == "dapo" and m.measure is ACCURACY)
    assert mean.estimate.mean == pytest.approx(statistics.fmean(v["evaluation/avg_at_k"] for v in final))
    assert (mean.iteration, mean.estimate.seeds) == (20, 3)


def test_the_mean_over_the_run_is_the_area_under_the_curve_of_evaluations(study: Path) -> None:
    comparison = _read(study)
    curves = [result.series(ACCURACY) for result in comparison.results if result.arm == "dapo"]
    areas = [np.trapezoid(list(curve.values()), list(curve)) / 20 for curve in curves]
    mean = next(
        m for m in comparison.means if m.variant.label == "dapo" and m.measure.column == "accuracy_over_run"
    )
    assert mean.estimate.mean == pytest.approx(statistics.fmean(areas))
    assert means_of_curve({0: 0.2, 5: 0.4, 15: 0.4}) == pytest.approx({5: 0.3, 15: 11 / 30})
    assert means_of_curve({5: 0.4}) == {}


def test_the_gain_is_the_last_accuracy_less_the_first_one_of_the_same_run(study: Path) -> None:
    comparison = _read(study)
    curves = [result.series(ACCURACY) for result in comparison.results if result.arm == "dapo"]
    mean = next(
        m for m in comparison.means if m.variant.label == "dapo" and m.measure.column == "accuracy_gain"
    )
    assert mean.estimate.mean == pytest.approx(statistics.fmean(curve[20] - curve[0] for curve in curves))
    assert gains({5: 0.4, 10: 0.3}) == pytest.approx({10: -0.1})


def test_differences_are_paired_by_seed_and_problem(study: Path) -> None:
    comparison = _read(study)
    found = _difference(comparison, "fipo", "grpo", "accuracy")
    assert found.by_problem
    by_hand = []
    for seed in (1, 2, 3):
        first, second = (_accuracies(study / f"runs/countdown-{arm}-seed{seed}") for arm in ("fipo", "grpo"))
        assert len(first) == PROBLEMS
        assert first.keys() == second.keys()
        by_hand.append(statistics.fmean(first[problem] - second[problem] for problem in first))
    assert found.estimate.mean == pytest.approx(statistics.fmean(by_hand))
    assert found.estimate.high is not None
    assert found.estimate.high < 0  # the gain of 0.5
    assert not _difference(comparison, "fipo", "grpo", "entropy").by_problem
    pairs = {(d.first.label, d.second.label) for d in comparison.differences}
    assert pairs == {("fipo", "dapo"), ("fipo", "grpo"), ("dapo", "grpo")}


def test_without_tables_the_pairs_are_seeds(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"))
    for table in tmp_path.glob("runs/*dapo*/evaluations/*"):
        table.unlink()
    found = _difference(_read(folder.path), "fipo", "dapo", "accuracy")
    assert not found.by_problem
    assert found.estimate.low is not None


def test_a_failed_run_stays_in_the_table_and_out_of_the_means(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"))
    folder.save_outcome("countdown-dapo-seed2", Outcome("failed", "no space, left (exit code 2)"))
    comparison = _read(tmp_path)
    row = next(row for row in rows(comparison) if row["run"] == "countdown-dapo-seed2")
    assert (row["status"], row["reason"]) == ("failed", "no space, left (exit code 2)")
    assert [variant.seeds for variant in comparison.variants] == [[1, 2, 3], [1, 3]]
    assert _difference(comparison, "fipo", "dapo", "accuracy").estimate.seeds == 2


def test_a_run_that_was_removed_or_cut_after_its_end_is_not_complete(tmp_path: Path) -> None:
    folder = write_study(tmp_path, arms=("fipo", "dapo"), seeds=(1, 2))
    shutil.rmtree(folder.run_dir("countdown-fipo-seed1"))
    metrics = folder.run_dir("countdown-fipo-seed2") / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]))
    comparison = _read(tmp_path)
    found = {result.name: result.outcome for result in comparison.results}
    assert found["countdown-fipo-seed1"] == Outcome("missing", "its folder has no metrics.jsonl")
    assert found["countdown-fipo-seed2"].status == "stopped"
    assert {mean.variant.label for mean in comparison.means} == {"dapo"}


def test_a_table_that_lacks_problems_is_not_paired_by_them(tmp_path: Path) -> None:
    folder = write_study(tmp_path, arms=("fipo", "dapo"), seeds=(1, 2))
    table = evaluation_table(folder.run_dir("countdown-fipo-seed1"), 20)
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:8]))
    assert not _difference(_read(tmp_path), "fipo", "dapo", "accuracy").by_problem


def test_a_study_without_a_complete_run_has_a_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo",), (1, 2))
    folder.save_outcome("countdown-fipo-seed1", Outcome("failed", "it printed nothing"))
    (tmp_path / "outcomes/countdown-fipo-seed2.json").unlink()
    comparison = _read(tmp_path)
    assert [row["status"] for row in rows(comparison)] == ["failed", "missing"]
    assert means_table(comparison)[1][0][-2:] == ["none complete", "–"]
    assert differences_table(comparison)[1] == []


def test_one_seed_claims_no_interval(tmp_path: Path) -> None:
    comparison = _read(write_study(tmp_path, ("fipo", "dapo"), (1,)).path)
    assert all(found.estimate.low is None for found in (*comparison.means, *comparison.differences))
    assert "[" not in to_markdown(comparison)


def test_the_table_has_every_run_and_every_measure(study: Path) -> None:
    comparison = _read(study)
    found = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [row["run"] for row in found] == [
        f"countdown-{arm}-seed{seed}" for arm in ("fipo", "dapo", "grpo") for seed in (1, 2, 3)
    ]
    first, result = found[0], comparison.results[0]
    for measure in MEASURES:
        assert float(first[measure.column]) == pytest.approx(result.final(measure), rel=1e-5)
    assert result.run is not None
    for record in result.run.evaluations():
        value = float(first[f"accuracy@{record.iteration}"])
        assert value == pytest.approx(record.values["evaluation/avg_at_k"], rel=1e-5)
    used = sum(result.run.series("tokens/used").values())
    assert float(first["tokens_trained"]) == pytest.approx(used, rel=1e-5)
    assert first["settings.objective.name"] == "fipo"
    assert first["version.torch"] == VERSIONS["torch"]
    assert first["version.commit"] == VERSIONS["commit"]


def test_weights_of_an_objective_without_weights_are_empty(study: Path) -> None:
    found = {row["run"]: row for row in csv.DictReader(io.StringIO(to_csv(_read(study))))}
    assert found["countdown-dapo-seed1"]["influence_mean"] == ""
    assert found["countdown-fipo-seed1"]["influence_max"] == "1.2"


@pytest.mark.parametrize(
    ("name", "shown"), [("a|b", r"a\|b"), ("a\nb", "a b"), (r"a\|b", r"a\\\|b"), ("<b>`", r"\<b>\`")]
)
def test_markdown_shows_a_name_as_it_is(study: Path, name: str, shown: str) -> None:
    comparison = _read(study)
    variant = replace(comparison.variants[0], factors=(("arm", name),))
    text = to_markdown(replace(comparison, variants=[variant]))
    assert text.splitlines()[2].startswith(f"| {shown} | – |")


def test_the_same_runs_give_the_same_files(study: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_results([study], tmp_path / name, allow_mixed_versions=False)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["results.csv", "results.html", "results.json", "results.md", "samples.md"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_infinite_setting_is_written(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("fipo", "dapo"), (1,))
    for run, half_life in (("fipo", ".inf"), ("dapo", "32.0")):
        with (folder.run_dir(f"countdown-{run}-seed1") / "config.yaml").open("a") as config:
            config.write(f"\nstudied:\n  half_life: {half_life}\n  both: .inf\n")
    write_results([tmp_path], tmp_path, allow_mixed_versions=False)
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [run["settings.studied.half_life"] for run in content["runs"]] == ["inf", 32.0]
    assert content["settings"]["studied.both"] == "inf"


def test_the_json_has_runs_means_and_differences(study: Path) -> None:
    comparison = _read(study)
    content = json.loads(to_json(comparison))
    assert len(content["runs"]) == 9
    assert content["means"][0]["seeds"] == [1, 2, 3]
    assert content["settings"]["optimizer.lr"] == 3e-4
    assert not content["settings"].keys() & {"objective.name", "seed"}  # runs differ in them
    assert {found["paired_by"] for found in content["differences"]} == {"seeds and problems", "seeds"}
    assert len(content["differences"]) == len(comparison.differences)


def test_runs_of_other_versions_are_refused_and_shown_if_allowed(tmp_path: Path) -> None:
    other = {**VERSIONS, "torch": "2.12.0"}
    write_study(tmp_path, ("fipo", "dapo"), (1, 2), versions={"countdown-dapo-seed2": other})
    with pytest.raises(
        UserError, match=r"different versions \(torch 2\.12\.0 and 2\.13\.0\).*--allow-mixed-versions"
    ):
        _read(tmp_path)
    found = {row["run"]: row["version.torch"] for row in rows(_read(tmp_path, allow=True))}
    assert found["countdown-dapo-seed2"] == "2.12.0"
    assert found["countdown-dapo-seed1"] == "2.13.0"


def test_a_version_that_a_run_did_not_record_differs() -> None:
    assert version_differences([{"torch": "1", "ray": "2"}, {"torch": "1"}]) == ["ray 2 and unknown"]
    assert version_differences([VERSIONS, VERSIONS]) == []


def test_any_runs_are_grouped_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{objective}-{lr}-{seed}", objective, seed, lr=lr)
        for objective in ("fipo", "dapo")
        for lr in (1e-4, 3e-4)
        for seed in (2, 1)
    ]
    comparison = _read(*runs)
    assert [variant.label for variant in comparison.variants] == [
        "fipo, lr=0.0001",
        "fipo, lr=0.0003",
        "dapo, lr=0.0001",
        "dapo, lr=0.0003",
    ]
    assert all(variant.seeds == [1, 2] for variant in comparison.variants)
    pairs = {(found.first.label, found.second.label) for found in comparison.differences}
    assert len(pairs) == 4  # those that differ in one setting, not in both
    assert ("fipo, lr=0.0001", "dapo, lr=0.0003") not in pairs


def test_runs_of_different_length_are_compared_where_both_were_evaluated(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{name}-{seed}", name, seed, iterations=length)
        for name, length in (("fipo", 10), ("dapo", 20))
        for seed in (1, 2)
    ]
    for run in runs:  # the same settings but for the objective: the shorter ones are in progress
        config = (run / "config.yaml").read_text().replace("iterations: 10", "iterations: 20")
        (run / "config.yaml").write_text(config)
    comparison = _read(*runs)
    assert {m.variant.label: m.iteration for m in comparison.means if m.measure is ACCURACY} == {
        "fipo": 10,
        "dapo": 20,
    }
    assert _difference(comparison, "fipo", "dapo", "accuracy").iteration == 10


def test_a_seed_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "fipo", 1) for name in "ab"]
    with pytest.raises(UserError, match="seed 1 of fipo is there twice"):
        _read(*runs)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics, or no seed"):
        _read(tmp_path)


def test_the_time_includes_evaluations_that_no_iteration_contains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fipo", 1, iterations=5)
    before = _read(run).results[0].seconds
    MetricsLog(run).log("evaluation", 0, {"evaluation/seconds": 7.0})
    after = _read(run).results[0].seconds
    assert before is not None
    assert after == pytest.approx(before + 7.0)


ROW = {
    "set": "s",
    "problem_id": "0",
    "prompt": "p",
    "ground_truth": "7",
    "accuracy": 1.0,
    "length": 3,
    "response": "r",
}


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "7",
        "[" * 200_000,
        *(
            json.dumps({**ROW, key: value})
            for key, value in (
                ("length", 10**400),
                ("length", -5),
                ("length", True),
                ("length", 1e308),
                ("accuracy", math.nan),
                ("accuracy", math.inf),
                ("accuracy", "1"),
                ("ground_truth", ["7"]),
                ("ground_truth", 7),
                ("prompt", None),
                ("response", None),
            )
        ),
    ],
    ids=lambda line: line[:60] if len(line) < 200 else f"{line[:20]}...",
)
def test_a_damaged_row_of_an_evaluation_is_named(tmp_path: Path, line: str) -> None:
    table = evaluation_table(tmp_path, 0)
    table.parent.mkdir()
    table.write_text(f"{json.dumps(ROW)}\n\n{line}\n")
    with pytest.raises(UserError, match=r"iteration_000000\.jsonl line 3 is not a row of an evaluation"):
        list(read_evaluation(tmp_path, 0))


def test_a_damaged_table_of_problems_is_named(tmp_path: Path) -> None:
    write_study(tmp_path, ("fipo", "dapo"), (1,))
    table = tmp_path / "runs/countdown-fipo-seed1/evaluations/iteration_000020.jsonl"
    table.write_text(table.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"iteration_000020\.jsonl line 161 is not a row of an evaluation"):
        _read(tmp_path)
