"""A complete run: windows, rates, intervals, the curve over GPUs and the page, with times made by hand."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case, case_of
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.workload import Assumptions
from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.page import render_page
from megatron_fipo.simulate.pictures import BINS, engine_loads, gantt
from megatron_fipo.simulate.playing import CHECKPOINTS, ENGINES, ITERATIONS, RESTARTS
from megatron_fipo.simulate.scaling import Curve, scaled_cases, simulate_scaling
from megatron_fipo.simulate.summary import duration, summary
from megatron_fipo.simulate.times import Basis, Times
from megatron_fipo.simulate.training import (
    Training,
    measured_iterations,
    simulate_iterations,
    simulate_training,
)
from tests.simulate.scenarios import affine, times

SAFE = Operation(gpu_mtbf_hours=1e12)
STEPS = {"low": 0.005, "value": 0.01, "high": 0.03}


def case(*overrides: str, **assumed: Any) -> Case:
    """24 trainer ranks in 3 replicas and 6 engines; 8 groups of 4, lengths up to 400."""
    config = load_config(
        "examples/qwen2.5-7b-math/fipo.yaml",
        [
            "batch.prompts_per_iteration=8",
            "batch.mini_batch_prompts=8",
            "batch.responses_per_prompt=4",
            "rollout.prompts_in_flight=20",
            "rollout.max_response_length=400",
            "rollout.num_engines=6",
            "parallel.tensor_model_parallel_size=4",
            "parallel.context_parallel_size=2",
            "parallel.data_parallel_size=3",
            "checkpoint.every=5",
            "reward.overlong_buffer=0",
            "iterations=40",
            *overrides,
        ],
    )
    model = read_model_config(config.model.path)
    return case_of(config, *model, load_machine("h100-80gb"), Assumptions(**assumed))


def times_of(of: Case, bound: str) -> Times:
    """Only the decoding step depends on the bound."""
    return times(decode_step=affine(STEPS[bound], 1e-5, 0.0), update=lambda n: 0.01 * n, sync=0.5, save=2.0)


@pytest.fixture(scope="module")
def growing() -> Training:
    return simulate_training(case(response_start=60.0), SAFE, times_of, responses=4000)


@pytest.fixture(scope="module")
def scaling() -> Curve:
    return simulate_scaling(case(), SAFE, times_of)


def test_windows_lie_over_a_training_that_grows(growing):
    assert [window.progress for window in growing.windows] == [0.0, 1 / 3, 2 / 3, 1.0]
    lengths = [window.mean_length for window in growing.windows]
    assert lengths == pytest.approx([60, 100, 140, 180], rel=0.2)
    assert growing.windows[0].seconds < growing.windows[-1].seconds


def test_one_window_is_enough_without_growth():
    assert [w.progress for w in simulate_training(case(), SAFE, times_of, responses=500).windows] == [0.5]


def test_without_losses_a_run_is_its_iterations_evaluations_and_checkpoints(growing):
    lost = growing.lost()
    seconds = growing.over_run(lambda window: window.seconds)
    assert lost[ITERATIONS] == pytest.approx(40 * seconds)
    assert lost[CHECKPOINTS] == pytest.approx(8 * 2.0)
    assert lost[RESTARTS] == lost[ENGINES] == 0
    assert growing.wall == pytest.approx(sum(lost.values()))


def test_rates_are_over_the_wall_time_and_all_devices(growing):
    trained = growing.per_second(lambda window: window.trained_tokens)
    tokens = growing.over_run(lambda window: 32 * (window.mean_length + 160)) * 40
    assert trained * growing.wall * 30 == pytest.approx(tokens)
    for window in growing.windows:
        assert 0 <= window.trainer_idle <= 1
        assert 0 <= window.engine_idle <= 1


def test_the_range_follows_the_ends_of_the_times(growing):
    assert 0.5 < growing.low < 0.8
    assert 1.5 < growing.high < 3.0
    low, high = growing.wall_range
    assert low == pytest.approx(growing.wall * growing.low)
    assert high == pytest.approx(growing.wall * growing.high)


def test_losses_cost_time():
    safe = simulate_training(case(), SAFE, times_of, responses=500)
    assert safe.counts()[RESTARTS] == 0
    operation = Operation(gpu_mtbf_hours=2.0, trainer_restart_s=30.0)
    losing = simulate_training(case(), operation, times_of, responses=500)
    assert losing.counts()[RESTARTS] > 0
    assert losing.counts()[ENGINES] > 0
    assert losing.lost()[RESTARTS] == pytest.approx(30.0 * losing.counts()[RESTARTS], rel=0.1)
    assert losing.wall > safe.wall


def test_the_budget_of_responses_decides_how_many_iterations_are_simulated():
    of = case()
    assert measured_iterations(of, 4, 2000) == round(2000 / 80 / 4)
    assert measured_iterations(of, 4, 1) == 1
    assert measured_iterations(of, 1, 10**9) == 40
    waiting = case("rollout.unfinished=continue", "rollout.max_staleness=3")
    assert measured_iterations(waiting, 4, 2000) == round(2000 / 80 / 4) - 2


@pytest.mark.slow
def test_interpolated_windows_equal_all_iterations():
    """Every iteration of a run on its own, with other seeds: synchronous `drop` carries nothing over."""
    of = case(
        "batch.prompts_per_iteration=64",
        "batch.responses_per_prompt=8",
        "rollout.prompts_in_flight=160",
        "iterations=60",
        response_start=60.0,
    )
    training = simulate_training(of, SAFE, times_of, responses=40_000)
    assert sum(len(window.iterations) for window in training.windows) < 35
    every = []
    for index in range(60):
        seeded = replace(of, config=replace(of.config, seed=100 + index))
        _, (iteration,) = simulate_iterations(seeded, times_of(of, "value"), index / 59, 1)
        every.append(iteration.seconds)
    error = training.lost()[ITERATIONS] / sum(every) - 1
    print(f"interpolated / all - 1 = {error:+.2%}; stated standard error {training.sampling_error:.2%}")
    assert abs(error) < 0.06


def test_the_loads_of_a_picture_are_what_engines_did(growing):
    iteration = growing.windows[-1].iterations[-1]
    loads = engine_loads(iteration, 6)
    seconds = loads.sum() * iteration.seconds / BINS
    # A load is noted when the driver learns of it, and the engine may have taken one step more.
    assert seconds == pytest.approx(iteration.usage.sequence_s, rel=0.02)


@pytest.mark.parametrize("engines", [6, 64])
def test_a_gantt_chart_has_the_trainer_and_the_engines(growing, engines):
    svg = gantt(growing.windows[0].iterations[0], engines, 5)
    assert "trainer" in svg
    assert ("engine 5" in svg) == (engines == 6)


def test_scaled_cases_keep_the_split():
    """3 replicas of 8 ranks and 6 engines are 3 units of (1 replica, 2 engines) = 10 GPUs."""
    scaled = scaled_cases(case())
    assert [one.devices for one in scaled] == [10, 20, 30, 40, 80, 160, 320, 640, 1280, 2560]
    assert all(one.engine_devices * 4 == one.trainer_devices for one in scaled)


def test_a_curve_ends_where_the_batch_does(scaling):
    assert [run.case.devices for run in scaling.runs] == [10, 20, 30, 40, 80, 160, 320]
    assert scaling.refused is not None
    assert scaling.refused.startswith("640 GPUs: parallel.data_parallel_size=64 exceeds the 32 responses")
    walls = [run.wall for run in scaling.runs]
    assert walls == sorted(walls, reverse=True)


def test_fewer_gpus_than_share_the_experts_are_left_out():
    """A stage of the recipe has 8 ranks, as many as share the experts: a half of it is no layout."""
    config = load_config(
        "examples/qwen3-30b-a3b/fipo.yaml",
        [
            "batch.prompts_per_iteration=8",
            "batch.mini_batch_prompts=8",
            "batch.responses_per_prompt=4",
            "rollout.prompts_in_flight=20",
            "rollout.max_response_length=400",
            "reward.overlong_buffer=0",
            "iterations=40",
        ],
    )
    mixture = case_of(config, *read_model_config(config.model.path), load_machine("h100-80gb"), Assumptions())
    curve = simulate_scaling(mixture, SAFE, times_of)
    assert [one.devices for one in scaled_cases(mixture)][:3] == [8, 16, 32]
    assert [run.case.devices for run in curve.runs] == [32, 64, 128, 256]
    assert curve.refused is not None
    assert curve.refused.startswith("512 GPUs: parallel.data_parallel_size=64 exceeds")


def test_the_page_is_complete_and_needs_no_network(growing, scaling):
    basis = Basis(frozenset({"one <H100>"}), frozenset({"network"}))
    page = render_page("mine.yaml", growing, scaling, Operation(), basis)
    assert not re.search(r"<script|<link|<img|<iframe|@import|\bsrc=|href=\"[^#]|url\([^#]", page)
    assert set(re.findall(r"https?://[^\"' ]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for name, value in summary(growing):
        assert name in page
        assert value in page
    assert "one &lt;H100&gt;" in page
    assert "--gpu-mtbf-hours" in page
    assert page.count("<svg") == 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (100, "100 s"), (600, "10 min"), (7200, "2 h"), (3600 * 1500, "1,500 h")],
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text
