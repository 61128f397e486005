"""What an iteration cost, in the metrics of real runs: all of its time is accounted for, and every number is documented."""

import re
from itertools import pairwise

import pytest

from megatron_fipo.report.cost_figures import WHERE_THE_TIME_WENT
from megatron_fipo.run_dir.metrics_log import Record, read_metrics
from tests.system.conftest import Train
from tests.system.runs import ROOT

SETTINGS = (
    "iterations=3",
    "evaluation.before_training=true",
    "evaluation.every=1",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "rollout.dump_every=1",
)
SYNCHRONOUS = ("parallel.data_parallel_size=2",)
ONE_STEP_OFF = (
    "rollout.mode=one_step_off",
    "rollout.unfinished=continue",
    "rollout.max_staleness=2",
    "rollout.num_engines=2",
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SYNCHRONOUS, id="synchronous, two ranks"),
        pytest.param(ONE_STEP_OFF, id="one step off, two engines", marks=pytest.mark.slow),
    ],
)
def records(request: pytest.FixtureRequest, train: Train, tmp_path_factory) -> list[Record]:
    run_dir = tmp_path_factory.mktemp("costs") / "run"
    train(run_dir, *SETTINGS, *request.param)
    return read_metrics(run_dir)


def iterations(records: list[Record]) -> list[Record]:
    return [record for record in records if record.kind == "iteration"]


def test_the_parts_of_the_panel_add_up_to_the_iteration(records):
    for record in iterations(records):
        values = record.values
        parts = [values[line.metric] for line in WHERE_THE_TIME_WENT.lines]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(values["time/total"], rel=0.02)
        assert values["time/rollout"] + values["time/rollout_wait"] > 0
        assert min(values["time/old_log_probs"], values["time/update"], values["time/weight_sync"]) > 0


def test_the_wall_time_lasts_from_one_iteration_to_the_next(records):
    """Compared with the clock of the log, over all iterations but the first."""
    done = iterations(records)
    elapsed = done[-1].time - done[0].time
    assert sum(record.values["time/total"] for record in done[1:]) == pytest.approx(
        elapsed, rel=0.02, abs=0.1
    )
    evaluations = {record.iteration: record for record in records if record.kind == "evaluation"}
    for before, record in pairwise(done):
        seconds = evaluations[before.iteration].values["evaluation/seconds"]
        assert record.values["time/evaluation"] >= seconds > 0
        saved = before.iteration % 2 == 0
        assert (record.values["time/checkpoint"] > 0.02) == saved
        assert record.values["time/log"] >= record.values["overhead/dump"] > 0


def test_rates_are_those_of_the_tokens_and_times(records):
    done, generated = iterations(records), 0.0
    engines = 3 - ranks(records)
    for record in done:
        values = record.values
        training = values["time/old_log_probs"] + values["time/update"]
        sampling = values["time/rollout"] + values["time/rollout_wait"]
        if engines == 2 and record is not done[-1]:
            sampling += values["time/handover"] + training
        rate = values.get("throughput/rollout_tokens_per_s_per_gpu")
        assert (rate is None) == (engines == 2 and record is done[-1]), (
            "nothing is left to sample one step off"
        )
        generated += (rate or 0.0) * sampling * engines
        trained = values["throughput/train_tokens_per_s_per_gpu"] * training * ranks(records)
        assert trained > values["tokens/used"], "prompts count too"
        assert values["throughput/tokens_per_s_per_gpu"] * values["time/total"] * 3 == pytest.approx(trained)
        assert values["wait/trainer"] == pytest.approx(
            (values["time/rollout"] + values["time/rollout_wait"]) / values["time/total"]
        )
        assert not any(name.startswith("mfu/") for name in values), "a CPU has no peak"
    assert generated == pytest.approx(sum(record.values["tokens/generated"] for record in done))


def ranks(records: list[Record]) -> int:
    """Of the two kinds of runs, which have three devices each: two ranks and an engine, or one rank and two engines."""
    return 1 if "engine_1/idle" in iterations(records)[0].values else 2


def test_an_engines_rate_over_its_busy_time_gives_the_tokens_of_the_first_iteration(records):
    """The evaluation before it does not count, and no other precedes it."""
    values = iterations(records)[0].values
    engines = ("engine_0", "engine_1") if ranks(records) == 1 else ("engine_mean",)
    sampled = sum(
        values[f"{engine}/decode_tokens_per_s"] * (1 - values[f"{engine}/idle"]) * values["time/total"]
        for engine in engines
    )
    sampling = values["time/rollout"] + values["time/rollout_wait"]
    if len(engines) == 2:
        sampling += values["time/handover"] + values["time/old_log_probs"] + values["time/update"]
    received = values["throughput/rollout_tokens_per_s_per_gpu"] * sampling * len(engines)
    assert sampled == pytest.approx(received, rel=0.02)


def test_engines_report_their_load_and_ranks_their_memory(records):
    for record in iterations(records):
        values = record.values
        assert 0 < values["engine_mean/idle"] < 1
        assert 0 <= values["engine_mean/prefix_hits"] < 1
        assert values["engine_mean/decode_tokens_per_s"] > 0
        assert 0.1 < values["memory/host_gib"] < 10
        assert values["memory/host_rank"] in range(ranks(records))
        assert min(values["overhead/put"], values["overhead/unpickle"], values["overhead/shards"]) > 0
    hits = [record.values["engine_mean/prefix_hits"] for record in iterations(records)]
    assert max(hits) > 0, "each prompt has four responses"
    assert max(record.values["overhead/scoring"] for record in iterations(records)) > 0


def test_every_number_is_documented(records):
    pages = "".join((ROOT / "docs" / page).read_text() for page in ("metrics.md", "algorithm.md"))
    named = set(re.findall(r"`([\w…/]+)`", pages))
    logged = {
        re.sub(r"^evaluation/countdown/", "evaluation/SET/", re.sub(r"^engine_\w+/", "…/", name))
        for record in records
        for name in record.values
    }
    assert logged - named == set()
