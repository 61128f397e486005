"""Every combination is a run; which setting wins; and an impossible combination stops all before anything runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config, validate
from megatron_fipo.errors import UserError
from megatron_fipo.study.grid import combinations, plan_runs, shrunk
from megatron_fipo.study.schema import Arm, Quick, StudyConfig, Task

COUNTDOWN = "examples/countdown/fipo.yaml"
STUDY = StudyConfig(
    name="study",
    output_dir="out/study",
    tasks={"countdown": Task(COUNTDOWN)},
    arms={"fipo": Arm(), "dapo": Arm(overrides=("objective.name=dapo",))},
    seeds=(1, 2),
)


def _accept(_: Config) -> None:
    pass


def test_seeds_are_the_outermost_loop() -> None:
    runs = plan_runs(STUDY, _accept)
    assert [run.name for run in runs] == [
        f"countdown-{arm}-seed{seed}" for seed in (1, 2) for arm in ("fipo", "dapo")
    ]
    assert [(run.config.seed, run.config.objective.name) for run in runs] == [
        (1, "fipo"),
        (1, "dapo"),
        (2, "fipo"),
        (2, "dapo"),
    ]
    assert {run.config.run_dir for run in runs} == {f"out/study/runs/{run.name}" for run in runs}


def test_the_grid_is_combined_with_every_task_and_arm() -> None:
    study = replace(
        STUDY,
        tasks={"a": Task(COUNTDOWN), "b": Task(COUNTDOWN, ("data.train_size=100",))},
        grid={"optimizer.lr": ("1e-5", "1e-4"), "objective.influence_clip": ("[0.8,1.2]", "null")},
    )
    runs = plan_runs(study, _accept)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 4 * 2
    points = {(run.config.optimizer.lr, run.config.objective.influence_clip) for run in runs}
    assert points == {(lr, clip) for lr in (1e-5, 1e-4) for clip in ((0.8, 1.2), None)}
    assert {run.combination.task: run.config.data.train_size for run in runs} == {"a": 4000, "b": 100}
    assert "a-fipo-optimizer.lr=1e-5-objective.influence_clip=_0.8_1.2_-seed1" in {run.name for run in runs}


def test_the_last_of_shared_task_arm_grid_and_quick_settings_wins() -> None:
    study = replace(
        STUDY,
        overrides=("iterations=1",),
        tasks={"countdown": Task(COUNTDOWN, ("iterations=2", "batch.mini_batch_prompts=12"))},
        arms={"fipo": Arm(overrides=("iterations=3",))},
        quick=Quick(seeds=(9,), overrides=("iterations=5",)),
    )

    def iterations(study: StudyConfig, quick: bool = False) -> set[int]:
        return {run.config.iterations for run in plan_runs(study, _accept, quick=quick)}

    assert iterations(study) == {3}
    assert iterations(replace(study, grid={"iterations": ("4",)})) == {4}
    quick = shrunk(study, True)
    assert iterations(replace(quick, grid={"iterations": ("4",)}), quick=True) == {5}
    assert (quick.seeds, quick.output_dir) == ((9,), "out/study-quick")
    assert shrunk(study, False) == study


def test_an_arm_may_have_a_config_of_its_own() -> None:
    study = replace(STUDY, arms={"grpo": Arm("examples/countdown/grpo.yaml")}, seeds=(1,))
    assert plan_runs(study, _accept)[0].config.objective.name == "grpo"


def test_impossible_combinations_are_named_with_arm_and_settings() -> None:
    study = replace(STUDY, grid={"objective.kl_coefficient": ("0", "0.1")})
    with pytest.raises(UserError) as refused:
        plan_runs(study, validate)
    assert str(refused.value).startswith(
        "2 of 4 combinations are impossible, so nothing runs. task countdown, arm fipo, objective.kl_coefficient=0.1: "
    )
    assert "arm dapo, objective.kl_coefficient=0.1: " in str(refused.value)


def test_a_combination_may_break_a_rule_across_settings() -> None:
    study = replace(STUDY, grid={"batch.mini_batch_prompts": ("6", "7")})
    with pytest.raises(UserError, match=r"arm dapo, batch\.mini_batch_prompts=7: batch\."):
        plan_runs(study, validate)


def test_an_unknown_setting_is_named_with_its_override() -> None:
    study = replace(STUDY, arms={"mine": Arm(overrides=("objective.nam=dapo",))})
    with pytest.raises(
        UserError, match=r"arm mine: override 'objective\.nam=dapo'.*did you mean 'objective\.name'"
    ):
        plan_runs(study, _accept)


def test_values_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(UserError, match="several runs would have the folder"):
        plan_runs(replace(STUDY, grid={"env.X": ("a b", "a_b")}), _accept)


def test_combinations_with_equal_settings_are_refused() -> None:
    arms = {
        "a": Arm(overrides=("objective.name=dapo",)),
        "b": Arm(overrides=("objective.name=fipo", "objective.name=dapo")),
    }
    with pytest.raises(UserError, match="arm a and task countdown, arm b have the same settings"):
        plan_runs(replace(STUDY, arms=arms), _accept)
    with pytest.raises(UserError, match="have the same settings"):
        plan_runs(replace(STUDY, grid={"optimizer.lr": ("1e-5", "0.00001")}), _accept)


@pytest.mark.parametrize("path", sorted(Path("examples/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_possible(path) -> None:
    study = load_config(path, [], StudyConfig)
    for quick in (False, True):
        shown = shrunk(study, quick)
        found = combinations(study, quick=quick)
        assert len(plan_runs(shown, validate, quick=quick)) == len(found) * len(shown.seeds)


def test_the_main_example_compares_credit_and_average_with_five_seeds() -> None:
    study = load_config("examples/studies/objectives.yaml", [], StudyConfig)
    objectives = {
        run.combination.arm: run.config.objective for run in plan_runs(study, validate, quick=False)
    }
    averages = {arm: (objective.name, objective.unit) for arm, objective in objectives.items()}
    assert averages == {
        "fipo": ("fipo", "kept_tokens"),
        "dapo": ("dapo", "kept_tokens"),
        "fipo_responses": ("fipo", "kept_sequences"),
        "dapo_responses": ("dapo", "kept_sequences"),
        "grpo": ("grpo", "kept_sequences"),
    }
    assert len(study.seeds) == 5
