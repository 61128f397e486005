"""The runs of a study: every combination of task, arm, grid values and seed, with the settings of each."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_fipo.config import Config, differences, load_config
from megatron_fipo.errors import UserError, listed
from megatron_fipo.study.schema import StudyConfig

Check = Callable[[Config], None]
"""Raises UserError for settings with which a run could not start."""
LONGEST_NAME = 200
SHOWN = 5
"""Impossible combinations in a message."""
QUICK = "-quick"
"""What `--quick` adds to the folder's name."""


@dataclass(frozen=True)
class Combination:
    """What the runs of several seeds have in common."""

    task: str
    arm: str
    grid: tuple[tuple[str, str], ...]
    """Setting and value, as text."""
    config: str
    """File of the settings."""
    overrides: tuple[str, ...]
    """Of that file, in order."""

    def __str__(self) -> str:
        values = "".join(f", {key}={value}" for key, value in self.grid)
        return f"task {self.task}, arm {self.arm}{values}"

    def run_name(self, seed: int) -> str:
        """The folder of a run, unique within the study."""
        values = [re.sub(r"[^A-Za-z0-9.=+-]", "_", f"{key}={value}") for key, value in self.grid]
        return "-".join([self.task, self.arm, *values, f"seed{seed}"])


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    combination: Combination
    seed: int
    config: Config = field(repr=False)
    """Complete, with run_dir and seed."""


def shrunk(study: StudyConfig, quick: bool) -> StudyConfig:
    """The study that is run: with `quick`, that of its section `quick`."""
    if not quick:
        return study
    seeds = study.seeds if study.quick.seeds is None else study.quick.seeds
    return replace(study, seeds=seeds, output_dir=study.output_dir.rstrip("/") + QUICK)


def combinations(study: StudyConfig, quick: bool) -> list[Combination]:
    """All combinations in the order of the file: task, arm, then the values of the grid, the last setting fastest."""
    values = [[(key, value) for value in choices] for key, choices in study.grid.items()]
    return [
        Combination(
            task,
            arm,
            point,
            settings.config or of_task.config,
            (
                *study.overrides,
                *of_task.overrides,
                *settings.overrides,
                *(f"{key}={value}" for key, value in point),
                *(study.quick.overrides if quick else ()),
            ),
        )
        for task, of_task in study.tasks.items()
        for arm, settings in study.arms.items()
        for point in itertools.product(*values)
    ]


def plan_runs(study: StudyConfig, check: Check, *, quick: bool = False) -> list[PlannedRun]:
    """Every run of the study, seed by seed, so that an interrupted study has some seeds of all combinations.

    `study` is `shrunk`. Raises UserError that names the combinations which are impossible.
    """
    found = combinations(study, quick)
    impossible = []
    runs = {}
    for combination in found:
        try:
            for seed in study.seeds:
                runs[combination, seed] = _planned(study, combination, seed)
            check(runs[combination, study.seeds[0]].config)  # seeds make no difference
        except UserError as error:
            impossible.append(f"{combination}: {error}")
    if impossible:
        count = f"{len(impossible)} of {len(found)} combinations {'is' if len(impossible) == 1 else 'are'}"
        more = "" if len(impossible) <= SHOWN else f"; and {len(impossible) - SHOWN} more"
        raise UserError(f"{count} impossible, so nothing runs. {'; '.join(impossible[:SHOWN])}{more}")
    _refuse_equal_settings([runs[combination, study.seeds[0]] for combination in found])
    planned = [runs[combination, seed] for seed in study.seeds for combination in found]
    _refuse_equal_names([run.name for run in planned])
    return planned


def _planned(study: StudyConfig, combination: Combination, seed: int) -> PlannedRun:
    name = combination.run_name(seed)
    own = (f"seed={seed}", f"run_dir={study.output_dir}/runs/{name}")
    config = load_config(combination.config, [*combination.overrides, *own])
    return PlannedRun(name, combination, seed, config)


def _refuse_equal_settings(runs: Sequence[PlannedRun]) -> None:
    """A difference between two arms that are the same would be noise."""
    for a, b in itertools.combinations(runs, 2):
        if not set(differences(a.config, b.config)) - {"run_dir"}:
            raise UserError(f"{a.combination} and {b.combination} have the same settings; remove one of them")


def _refuse_equal_names(names: Sequence[str]) -> None:
    if long := [name for name in names if len(name) > LONGEST_NAME]:
        raise UserError(
            f"the run {long[0]} would have a name of more than {LONGEST_NAME} characters; make values of grid arms of their own"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"several runs would have the folder {listed(repeated, SHOWN)}; make these values of grid arms of their own"
        )
