"""A finished run on disk: what its iterations can be replayed from, or one sentence why not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fipo.config import Config, ParallelConfig, load_stored_config
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.run_dir import CONFIG_FILE
from megatron_fipo.run_dir.metrics_log import read_metrics
from megatron_fipo.run_dir.run_directory import RunDirectory

NEEDS = "train with rollout.dump_every=1 checkpoint.every=1 and checkpoint.keep_last=ITERATIONS"


@dataclass(frozen=True)
class FinishedRun:
    """A run of FIPO on a dense model, with mini-steps in which F is not zero."""

    config: Config
    directory: RunDirectory
    dumps: DumpFolder
    metrics: dict[int, dict[str, float]]
    """By iteration, from 1."""

    def weights_before(self, iteration: int) -> Path | None:
        """The checkpoint that iteration `iteration` started from; None for the first, which starts from the model's folder."""
        return None if iteration == 1 else self.directory.checkpoint(iteration - 1)

    def obstacle(self, iteration: int) -> str | None:
        """Why an iteration cannot be replayed; None if it can."""
        if iteration < 1 or iteration not in self.metrics:
            return f"the run has no iteration {iteration} in its metrics"
        if iteration not in self.dumps.iterations:
            return f"iteration {iteration} was not dumped"
        if not self.has_weights_before(iteration):
            return f"there is no checkpoint of iteration {iteration - 1}, from which iteration {iteration} started"
        return None

    def has_weights_before(self, iteration: int) -> bool:
        """Whether the weights at the start of an iteration are on disk."""
        return iteration == 1 or self.directory.has(iteration - 1)

    def choose(self, wanted: Sequence[int]) -> list[int]:
        """The iterations to replay in ascending order: `wanted`, or all that can be. UserError if one cannot, or none can."""
        for iteration in wanted:
            if (obstacle := self.obstacle(iteration)) is not None:
                raise UserError(f"{self.directory.path}: {obstacle}; {NEEDS}")
        found = sorted(set(wanted)) or [i for i in sorted(self.metrics) if self.obstacle(i) is None]
        if not found:
            raise UserError(
                f"{self.directory.path} has no iteration with both a dump and the checkpoint before it; {NEEDS}"
            )
        return found


def open_run(path: Path) -> FinishedRun:
    """The run in a folder. UserError if it is none that this command can replay."""
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} has no {CONFIG_FILE}; give the folder of a run of megatron-fipo train")
    config = load_stored_config(path / CONFIG_FILE)
    if config.objective.name != "fipo":
        raise UserError(
            f"objective.name={config.objective.name} has no FutureKL in {path}; give a run of fipo"
        )
    if config.batch.prompts_per_iteration <= config.batch.mini_batch_prompts:
        raise UserError(
            f"{path} takes one mini-step per iteration, in which FutureKL is zero; lower batch.mini_batch_prompts"
        )
    architecture = read_architecture(config.model.path)
    if architecture.experts is not None:
        raise UserError(
            f"{config.model.path} is a mixture of experts, which is not replayed; give a run of a dense model"
        )
    dumps = DumpFolder(path / "rollouts", config.rollout.temperature, architecture.vocab_size)
    metrics = {record.iteration: record.values for record in read_metrics(path) if record.kind == "iteration"}
    return FinishedRun(config, RunDirectory(path), dumps, metrics)


def for_one_rank(config: Config) -> Config:
    """The same settings for one rank without engines. The numbers depend on the layout by rounding alone."""
    parallel = config.parallel if config.parallel.world_size == 1 else ParallelConfig()
    return replace(
        config, parallel=parallel, rollout=replace(config.rollout, engine="local", placement="separate")
    )
