"""A run played through: what it takes without losses, and what losses add."""

import numpy as np
import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.simulate.playing import (
    CHECKPOINTS,
    ENGINES,
    EVALUATIONS,
    ITERATIONS,
    REPEATED,
    RESTARTS,
    Costs,
    play,
)
from tests.simulate.scenarios import config

SAFE = Costs(save_s=7.0, trainer_losses_per_s=0, trainer_restart_s=0, engine_losses_per_s=0, engine_loss_s=0)
ITERATION_S, EVALUATION_S = [100.0 + index for index in range(20)], [10.0] * 20


def played(costs, seed=0, checkpoint=5, evaluation=4, before=True):
    settings = config()
    settings.checkpoint.every, settings.evaluation.every = checkpoint, evaluation
    settings.evaluation.before_training = before
    return play(ITERATION_S, EVALUATION_S, settings, costs, seed)


@pytest.mark.parametrize(
    ("checkpoint", "evaluation", "before", "saves", "evaluations"),
    [(5, 4, True, 4, 6), (3, 0, False, 7, 1), (0, 7, True, 1, 4)],
)
def test_without_losses_all_parts_are_counted_once(checkpoint, evaluation, before, saves, evaluations):
    run = played(SAFE, checkpoint=checkpoint, evaluation=evaluation, before=before)
    assert run.seconds == {
        ITERATIONS: sum(ITERATION_S),
        EVALUATIONS: 10.0 * evaluations,
        CHECKPOINTS: 7.0 * saves,
        REPEATED: 0.0,
        RESTARTS: 0.0,
        ENGINES: 0.0,
    }
    assert run.wall == sum(run.seconds.values())


def test_losses_repeat_what_was_not_saved():
    costs = Costs(7.0, 1 / 500, 50.0, 0, 0)
    runs = [played(costs, seed) for seed in range(400)]
    for run in runs:
        assert run.seconds[ITERATIONS] == pytest.approx(sum(ITERATION_S))
        assert run.seconds[EVALUATIONS] == pytest.approx(60.0)
        assert run.seconds[CHECKPOINTS] == 28.0
        assert run.seconds[RESTARTS] <= 50.0 * run.counts[RESTARTS]
        assert bool(run.seconds[REPEATED]) == bool(run.counts[RESTARTS])
    losses = np.array([run.counts[RESTARTS] for run in runs])
    exposed = np.array([run.wall - 10.0 for run in runs])  # the first evaluation is before training
    assert losses.sum() == pytest.approx(exposed.sum() / 500, rel=4 / losses.sum() ** 0.5)


def test_frequent_checkpoints_repeat_no_iteration():
    costs = Costs(7.0, 1 / 500, 50.0, 0, 0)
    assert all(played(costs, seed, checkpoint=1).counts[REPEATED] == 0 for seed in range(50))
    assert sum(played(costs, seed, checkpoint=5).counts[REPEATED] for seed in range(50)) > 0


def test_lost_engines_delay():
    runs = [played(Costs(7.0, 0, 0, 1 / 300, 25.0), seed) for seed in range(200)]
    assert all(run.seconds[ENGINES] == 25.0 * run.counts[ENGINES] for run in runs)
    mean = np.mean([run.counts[ENGINES] for run in runs])
    assert mean == pytest.approx(sum(ITERATION_S) / 300, rel=0.1)


def test_a_seed_gives_one_run():
    costs = Costs(7.0, 1 / 500, 50.0, 1 / 300, 25.0)
    assert played(costs, 3) == played(costs, 3)
    assert played(costs, 3) != played(costs, 4)


def test_a_run_that_never_reaches_a_checkpoint_is_refused():
    with pytest.raises(
        UserError,
        match=r"lost once in 0\.0222 h on average .* lower checkpoint.every or raise --gpu-mtbf-hours",
    ):
        played(Costs(7.0, 1 / 80, 50.0, 0, 0))
