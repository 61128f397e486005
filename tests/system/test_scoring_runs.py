"""Training runs whose reward function misbehaves: scorers are real processes on the module's cluster."""

import gc
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.driver import cluster
from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Completion, Reward
from tests.system.runs import iterations, same_numbers, weights

SAMPLED_AHEAD = ("groups/surplus", "groups/unfinished", "tokens/carried")
"""How far the next iteration's groups are when an update begins: with one_step_off that depends on timing."""


def not_a_number(completion: Completion) -> float:
    return float("nan")


def breaking_after(groups: int) -> type:
    """A scorer whose reward is NaN after so many groups."""

    class Breaking(ScorerActor):
        scored = 0

        def score(self, request: ScoreRequest) -> Any:
            self.scored += 1
            if self.scored > groups:
                self._terms = {
                    "countdown": (replace(self._terms["countdown"][0], reward=Reward(not_a_number)),)
                }
            return super().score(request)

    return Breaking


def erratic(folder: Path) -> type:
    """A scorer that takes a random time and whose process ends at its second group, once per group and scorer."""

    class Erratic(ScorerActor):
        def score(self, request: ScoreRequest) -> Any:
            time.sleep(random.random() / 5)
            died = folder / str(request.key % 5)
            if not died.exists():
                died.touch()
                os._exit(1)
            return super().score(request)

    return Erratic


def test_a_reward_that_breaks_stops_the_run_with_its_state_and_a_later_one_resumes(
    train, tmp_path, monkeypatch
):
    run_dir, settings = tmp_path / "run", ("evaluation.before_training=false", "checkpoint.every=0")
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "ScorerActor", breaking_after(30))
        done = train(run_dir, *settings, "iterations=50", expect=2)
    assert "groups could not be scored, above reward.max_failure_share = 0.1" in done.stderr
    assert (
        "the reward function countdown returned nan (float), not a finite number or a Score for response 1 of 4 to"
        in done.stderr
    )
    assert done.stdout.count("returned nan") == 1
    assert "\n1 scorer (countdown; 10 s and 1,024 MB per response)\n" in done.stdout
    assert "state saved" in done.stdout
    first = iterations(run_dir)
    assert first
    assert sum(step["groups/unscored"] for step in first) < 10
    assert all(step["scorers/failures"] >= step["groups/unscored"] for step in first)
    assert all(step["scorers/retries"] == step["scorers/restarts"] == 0 for step in first)
    gc.collect()  # the error's traceback holds the lock of the run's folder
    train(run_dir, *settings, f"iterations={len(first) + 1}")
    assert len(iterations(run_dir)) == len(first) + 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "one_step_off"])
def test_slow_and_dying_scorers_leave_no_trace_in_the_weights(train, tmp_path, monkeypatch, mode):
    settings = (
        "deterministic=true",
        "evaluation.before_training=false",
        "iterations=3",
        f"rollout.mode={mode}",
    )
    train(tmp_path / "calm", *settings)
    monkeypatch.setattr(cluster, "ScorerActor", erratic(tmp_path))
    train(tmp_path / "troubled", *settings, "reward.scorers=3")
    calm, troubled = iterations(tmp_path / "calm"), iterations(tmp_path / "troubled")
    pairs = zip(calm, troubled, strict=True)
    assert all(same_numbers(*pair, *SAMPLED_AHEAD, "scorers/") for pair in pairs)
    for name in ("retries", "restarts", "failures"):
        assert sum(step[f"scorers/{name}"] for step in calm) == 0
        assert sum(step[f"scorers/{name}"] for step in troubled) > 0
    assert (tmp_path / "4").exists()
    assert weights(tmp_path / "calm") == weights(tmp_path / "troubled")
