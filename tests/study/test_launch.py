"""What a study's folder may hold before its runs start."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config
from megatron_fipo.errors import UserError
from megatron_fipo.study.grid import plan_runs
from megatron_fipo.study.launch import claim
from megatron_fipo.study.outcome import Outcome, StudyFolder
from megatron_fipo.study.schema import Arm, StudyConfig, Task


def _accept(_: Config) -> None:
    pass


def test_results_of_runs_that_are_not_part_of_the_study_are_not_dropped(tmp_path: Path) -> None:
    study = StudyConfig(
        name="study",
        output_dir=str(tmp_path / "out"),
        tasks={"countdown": Task("examples/countdown/fipo.yaml")},
        arms={"fipo": Arm()},
        seeds=(1, 2),
    )
    claim(study, plan_runs(study, _accept), allow_mixed_versions=False).release()
    folder = StudyFolder(tmp_path / "out")
    folder.save_outcome("countdown-fipo-seed1", Outcome("complete"))
    stored = folder.settings.read_text()
    fewer = replace(study, seeds=(2,))
    with pytest.raises(UserError, match=r"1 runs that are not part of this study \(countdown-fipo-seed1\)"):
        claim(fewer, plan_runs(fewer, _accept), allow_mixed_versions=False)
    assert folder.settings.read_text() == stored
