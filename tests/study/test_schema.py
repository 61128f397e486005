"""A study is read by the loader of all settings; what makes no study is refused with its key."""

from pathlib import Path

import pytest

from megatron_fipo.config import load_config, save_config
from megatron_fipo.config.describe import describe
from megatron_fipo.errors import UserError
from megatron_fipo.study.schema import Arm, StudyConfig, Task

STUDY = """\
name: mine
output_dir: out
tasks: {one: a.yaml}
arms:
  base: {}
  other: {overrides: [objective.name=dapo]}
  third: c.yaml
"""


def _load(tmp_path: Path, text: str, *overrides: str) -> StudyConfig:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_config(path, list(overrides), StudyConfig)


def test_entries_of_text_and_empty_entries(tmp_path: Path) -> None:
    study = _load(tmp_path, STUDY)
    assert study.tasks == {"one": Task("a.yaml")}
    assert study.arms == {
        "base": Arm(),
        "other": Arm(overrides=("objective.name=dapo",)),
        "third": Arm("c.yaml"),
    }


def test_values_of_the_grid_are_text_as_written(tmp_path: Path) -> None:
    text = (
        STUDY + 'grid:\n  optimizer.lr: [1e-5, 1.0e-4]\n  objective.influence_clip: ["[0.8,1.2]", "null"]\n'
    )
    assert _load(tmp_path, text).grid == {
        "optimizer.lr": ("1e-5", "1.0e-4"),
        "objective.influence_clip": ("[0.8,1.2]", "null"),
    }
    assert _load(tmp_path, STUDY, "grid.optimizer.lr=[1,2]", "seeds=[7]").grid == {"optimizer.lr": ("1", "2")}


def test_a_stored_study_is_read_back_equal(tmp_path: Path) -> None:
    study = _load(tmp_path, STUDY + "grid: {seed_of.x: ['[1, 2]', 'null', '0123']}\nquick: {seeds: [3]}\n")
    save_config(study, tmp_path / "stored.yaml")
    assert load_config(tmp_path / "stored.yaml", [], StudyConfig) == study


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: [1, 1]", "seeds must be different integers of at least 0, not [1, 1]"),
        ("seeds: []", "seeds must be different integers"),
        ("quick: {seeds: [-1]}", "quick.seeds must be different integers"),
        ("grid: {optimizer.lr: []}", "grid.optimizer.lr must be different values, at least one"),
        ("parallel_runs: 0", "parallel_runs must be at least 1"),
        ("time_limit_minutes: 0", "time_limit_minutes must be above 0"),
        ("overrides: [seed=3]", "seed is given to each run by the study"),
        ("quick: {overrides: [run_dir=x]}", "run_dir is given to each run by the study"),
        ("seedz: [1]", "study.yaml, line 8: unknown key 'seedz'; did you mean 'seeds'?"),
        ("seeds: [x]", "study.yaml, line 8: seeds must be an integer, not 'x'"),
    ],
)
def test_what_makes_no_study_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        _load(tmp_path, STUDY + change + "\n")
    assert message in str(refused.value)


def test_an_arm_without_a_value_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arms\.base has no value; write base: \{\} for defaults"):
        _load(tmp_path, STUDY.replace("base: {}", "base:"))


def test_a_grid_without_values_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grid\.optimizer\.lr has no value; give it one"):
        _load(tmp_path, STUDY + "grid: {optimizer.lr: }\n")


def test_tasks_and_arms_are_needed(tmp_path: Path) -> None:
    for missing in ("tasks", "arms"):
        with pytest.raises(UserError, match=f"{missing} needs at least one entry"):
            _load(
                tmp_path,
                "name: a\noutput_dir: b\n" + ("arms: {a: {}}" if missing == "tasks" else "tasks: {a: b}"),
            )


def test_a_config_of_an_arm_cannot_replace_those_of_several_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arms\.third\.config would replace the config of 2 tasks"):
        _load(tmp_path, STUDY, "tasks.two=b.yaml")


def test_every_setting_is_described() -> None:
    described = describe(StudyConfig)
    assert all(f"{name}:" in described for name in ("output_dir", "parallel_runs", "quick"))


def test_an_empty_entry_still_needs_what_has_no_default(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no value for tasks\.one\.config"):
        _load(tmp_path, STUDY.replace("{one: a.yaml}", "{one: {}}"))
