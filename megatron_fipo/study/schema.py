"""Every setting of a study, with its meaning beside it, as in `config/schema.py`."""

from dataclasses import dataclass, field

from megatron_fipo.fields import REQUIRED, file_path, number, sections

OWN_KEYS = ("seed", "run_dir")
"""Settings of a run that the study gives."""


@dataclass
class Task:
    """One entry of `tasks`. An entry of text alone is its config."""

    config: str = file_path(REQUIRED)
    """YAML file as for `train`."""
    overrides: tuple[str, ...] = ()
    """Settings of this task, each as `section.key=value`."""


@dataclass
class Arm:
    """One entry of `arms`. An entry of text alone is its config."""

    config: str | None = file_path(None)
    """YAML file as for `train` in place of the task's; only for a study of one task."""
    overrides: tuple[str, ...] = ()
    """Settings of this arm, each as `section.key=value`."""


@dataclass
class Quick:
    """What `--quick` changes, so that a study can be tried in minutes. Its results go to a folder of their own."""

    seeds: tuple[int, ...] | None = None
    """Seeds in place of those of the study; null for the same."""
    overrides: tuple[str, ...] = ()
    """Settings of all runs, which win over all others, each as `section.key=value`."""


@dataclass
class StudyConfig:
    """A study: `megatron-fipo study`. Each task, arm, combination of `grid` and seed is one run.

    A setting comes from the task's file, then from `overrides`, the task's, the arm's, `grid`, and `quick`; the last one wins.
    """

    name: str = REQUIRED
    """Title of the study."""
    output_dir: str = file_path(REQUIRED)
    """Folder of the study: its runs and their results. --quick adds `-quick` to the name."""
    tasks: dict[str, Task] = sections()
    """What is trained, by name: `tasks: {countdown: examples/countdown/fipo.yaml}`. Arms are compared within a task."""
    overrides: tuple[str, ...] = ()
    """Settings of all runs, each as on the command line: `["iterations=40", "evaluation.every=10"]`."""
    arms: dict[str, Arm] = sections()
    """What is compared, by name: `arms: {dapo: {overrides: ["objective.name=dapo"]}}`."""
    grid: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of further settings, each combined with every arm: `grid: {optimizer.lr: [1e-5, 1e-4]}`. Quote a list or null:
    `"[0.8,1.2]"`."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of each combination. An interval over fewer than 5 is wide; with one seed there is none."""
    parallel_runs: int = number(1, least=1, most=64)
    """Runs at one time, each with a Ray cluster of its own. More than 1 only without GPUs: the runs would share them."""
    time_limit_minutes: float | None = number(None, above=0)
    """Time after which a run is asked to save its state and stop, and counts as failed; null for no limit. The time begins
    again when the same command continues it."""
    quick: Quick = field(default_factory=Quick)

    def __post_init__(self) -> None:
        """Raises ValueError for names and lists that make no study."""
        if not self.tasks:
            raise ValueError("tasks needs at least one entry, as in tasks: {countdown: CONFIG}")
        if not self.arms:
            raise ValueError("arms needs at least one entry, as in arms: {fipo: {}}")
        for key, seeds in (("seeds", self.seeds), ("quick.seeds", self.quick.seeds)):
            if seeds is not None and (not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds)):
                raise ValueError(f"{key} must be different integers of at least 0, not {list(seeds)}")
        for key, values in self.grid.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"grid.{key} must be different values, at least one, not {list(values)}")
        own = [arm for arm, settings in self.arms.items() if settings.config is not None]
        if own and len(self.tasks) > 1:
            raise ValueError(
                f"arms.{own[0]}.config would replace the config of {len(self.tasks)} tasks; give its overrides instead"
            )
        for key in self.given_keys():
            if key in OWN_KEYS:
                raise ValueError(
                    f"{key} is given to each run by the study; remove it from overrides and grid"
                )

    def given_keys(self) -> list[str]:
        """The settings that overrides and grid name."""
        lists = (
            self.overrides,
            *(task.overrides for task in self.tasks.values()),
            *(arm.overrides for arm in self.arms.values()),
            self.quick.overrides,
        )
        return [*(override.partition("=")[0] for overrides in lists for override in overrides), *self.grid]
