"""Runs with an environment: real engines and workers, and failures that cost their own group."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.system.runs import iterations, weights

CALCULATOR = [
    "environment.name=tests.system.calculators:step",
    'environment.stop=["="]',
    "environment.max_turns=12",
    "environment.max_observation_tokens=3",
    "iterations=2",
    "evaluation.before_training=false",
]
EXACT = [*CALCULATOR, "deterministic=true", "checkpoint.every=1", "rollout.dump_every=1"]


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory) -> Path:
    """Two iterations without an interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(run_dir, *EXACT)
    return run_dir


def test_a_run_trains_on_sampled_tokens_alone(straight):
    for number, values in enumerate(iterations(straight), start=1):
        dump = straight / f"rollouts/iteration_{number:06d}.parquet"
        rows = pyarrow.parquet.read_table(dump).to_pylist()
        observed = sum(row["response_mask"].count(0) for row in rows)
        assert values["environment/observation_tokens"] == observed > 0
        assert (
            values["policy/tokens"] == sum(sum(row["response_mask"]) for row in rows) == values["tokens/used"]
        )
        assert values["environment/turns"] > 1
        assert values["environment/failed"] == values["environment/failures"] == 0
        for row in rows:
            assert len(row["response_ids"]) <= 64
            observed = [
                p for p, m in zip(row["rollout_log_probs"], row["response_mask"], strict=True) if not m
            ]
            assert set(observed) <= {0.0}


def test_a_run_resumed_from_a_checkpoint_has_the_same_bits(straight, train, tmp_path):
    train(tmp_path / "run", *EXACT, "iterations=1")
    train(tmp_path / "run", *EXACT)
    assert weights(tmp_path / "run") == weights(straight)
    for number in (1, 2):
        name = f"rollouts/iteration_{number:06d}.parquet"
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


def test_an_evaluation_has_the_same_environment(straight):
    (table,) = sorted((straight / "evaluations").glob("*.jsonl"))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert all(row["length"] <= len(row["response"]) + 1 for row in rows)
    assert any(row["length"] < len(row["response"]) for row in rows), (
        "observations are not part of the length"
    )


@pytest.mark.slow  # tests/driver/test_episodes.py interrupts episodes in every state
def test_interrupted_episodes_continue_under_the_next_weights(train, tmp_path):
    """Asynchronous: weights change while episodes are in any state."""
    done = train(
        tmp_path / "run",
        *CALCULATOR,
        "iterations=3",
        "rollout.mode=fully_asynchronous",
        "rollout.unfinished=continue",
        "rollout.max_staleness=3",
        "objective.correction=tis",
        "environment.workers=2",
        "rollout.dump_every=1",
    )
    values = iterations(tmp_path / "run")
    assert len(values) == 3, done.stdout
    for value in values:
        assert value["environment/failed"] == value["groups/failed"] == value["groups/unscored"] == 0


def test_failing_environments_cost_their_groups(train, tmp_path):
    """Every third problem's environment raises: its groups are dropped, counted and never scored."""
    settings = ["environment.name=tests.system.calculators:sometimes", "environment.max_failure_share=1"]
    done = train(tmp_path / "run", *CALCULATOR, *settings, "rollout.prompts_in_flight=12", "iterations=1")
    (values,) = iterations(tmp_path / "run")
    assert values["environment/failed"] >= values["groups/unscored"] > 0
    assert values["groups/failed"] == 0
    output = done.stdout + done.stderr
    assert output.count("ZeroDivisionError: division by zero") == 1, "the traceback, once"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.system.calculators:wait", "is an async function"),
        pytest.param("tests.system.no_such:step", "there is no module", marks=pytest.mark.slow),
    ],
)
def test_an_environment_that_is_none_ends_the_command_at_start(train, tmp_path, name, words):
    done = train(tmp_path / "run", *CALCULATOR, f"environment.name={name}", expect=2)
    assert words in done.stdout + done.stderr
