"""The logs of a run survive crashes and resumes."""

import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.run_dir.metrics_log import MetricsLog, Sample, SampleLog, read_metrics, read_samples


def _sample(
    iteration: int = 1, tokens: tuple[str, ...] = ("3*7", "\n"), weights: list[float] | None = None
) -> Sample:
    return Sample(iteration, "3,7=21:", list(tokens), weights, 1.0, 1.0, 0.5, "stop")


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log("evaluation", 0, {"evaluation/avg_at_k": 0.25})
    log.log("iteration", 1, {"reward/mean": -0.5, "groups/used": 24})
    records = read_metrics(tmp_path)
    assert [(r.kind, r.iteration, r.values) for r in records] == [
        ("evaluation", 0, {"evaluation/avg_at_k": 0.25}),
        ("iteration", 1, {"reward/mean": -0.5, "groups/used": 24.0}),
    ]
    assert records[0].time <= records[1].time


def test_non_finite_values_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    MetricsLog(tmp_path).log("iteration", 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    line = json.loads(
        (tmp_path / "metrics.jsonl").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert line["values"] == {"a": None, "b": None, "c": None, "d": 1.0}
    values = read_metrics(tmp_path)[0].values
    assert all(math.isnan(values[name]) for name in "abc")


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert list(read_samples(tmp_path)) == []


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(min_value=1, max_value=60))
def test_a_torn_last_line_costs_that_line_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    log = MetricsLog(run_dir)
    for iteration in range(1, 4):
        log.log("iteration", iteration, {"reward/mean": iteration / 10})
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = [record.iteration for record in read_metrics(run_dir)]
    assert survivors == ([1, 2, 3] if cut == 1 else [1, 2])  # a lone missing newline loses nothing

    MetricsLog(run_dir).log("iteration", 9, {"reward/mean": 1.0})
    assert [record.iteration for record in read_metrics(run_dir)] == [*survivors, 9]


def test_a_torn_line_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricsLog(tmp_path).log("iteration", 1, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iter')
    with caplog.at_level(logging.WARNING):
        assert len(read_metrics(tmp_path)) == 1
    assert "line (2)" in caplog.text


def test_damage_before_the_last_line_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"iteration": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is damaged"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(UserError, match="line 1 is not a metrics record"):
        read_metrics(tmp_path)


def test_resume_drops_later_iterations(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log("evaluation", 0, {})
    for iteration in range(1, 6):
        log.log("iteration", iteration, {})
        log.log("evaluation", iteration, {})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    log.truncate_after(3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:7]
    log.log("iteration", 4, {"second": 1.0})
    assert [record.iteration for record in read_metrics(tmp_path)] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.truncate_after(-1)
    assert list(tmp_path.iterdir()) == []


def test_truncation_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    for iteration in range(1, 4):
        log.log("iteration", iteration, {})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match="No space"):
        log.truncate_after(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.path = Path("/dev/full")
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.log("iteration", 1, {})


def test_samples_are_read_back_with_any_text(tmp_path: Path) -> None:
    log = SampleLog(tmp_path)
    samples = [_sample(1, ("é", "\n", "\ud800", "<b>"), [1.0, 1.2, 0.8, 1.0]), _sample(2)]
    for sample in samples:
        log.log(sample)
    assert list(read_samples(tmp_path)) == samples
    log.truncate_after(1)
    assert list(read_samples(tmp_path)) == samples[:1]


def test_a_sample_needs_a_weight_per_token() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 influence weights"):
        _sample(weights=[1.0])
