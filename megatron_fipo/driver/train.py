"""`megatron-fipo train`: assemble a run (Ray, trainer ranks, engines, data, logs), run it, take it apart."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, validate
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.cluster import run_cluster, start_engines, start_scorers
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.loop import Loop, LoopComponents, check_stop
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.driver.rollout.engine_actors import COLOCATED_GPU_SHARE
from megatron_fipo.driver.rollout.group_source import GroupSource, Interrupted, LiveGroups, ReplayGroups
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.driver.run_end import MODEL, check_export, export_model, summarize, write_report_of
from megatron_fipo.driver.scoring.pool import ScorerPool
from megatron_fipo.driver.stop import Stop
from megatron_fipo.driver.tokenizer import checked_tokenizer, pad_id, prints_date
from megatron_fipo.driver.tracking import Trackers
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.engine.registry import engine_type
from megatron_fipo.environment import Machine, this_machine
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.run_dir.inputs import RunInputs, model_files
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.dataset import Dataset, fingerprint
from megatron_fipo.tasks.registry import load_datasets
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.tasks.task import Problem


def train(config: Config, allow_change: Sequence[str] = (), replay: Path | None = None) -> int:
    """`megatron-fipo train`: run or resume `config`, then write model and report. Returns the exit code (see `driver/stop.py`)."""
    architecture = read_architecture(Path(config.model.path))
    validate(config, architecture, None if config.ray_address else this_machine())
    source = (
        None if replay is None else DumpFolder(replay, config.rollout.temperature, architecture.vocab_size)
    )
    if source is None:
        engine_type(config.rollout.engine).load()  # fails before anything is written
    tokenizer = checked_tokenizer(config.model.path, config.model.trust_remote_code)
    decode = ResponseText(tokenizer)
    with Console(config.iterations) as console:
        directory = RunDirectory(Path(config.run_dir).resolve())
        train_set, held_out, inputs = load_inputs(config, directory, tokenizer, console.note)
        for change in directory.claim(config, inputs, allow_change):
            console.note(change)
        check_export(directory.path / MODEL)
        console.phase("starting")
        with (
            Stop(config.max_walltime_minutes, console.note) as stop,
            run_cluster(config, architecture, console.note) as machine,
            contextlib.ExitStack() as stack,
        ):
            validate(config, architecture, machine)
            trainer = start_trainer(config, machine)
            stack.callback(trainer.shutdown)
            for line in trainer.describe():
                console.note(line)
            rollouts: GroupSource
            if source is not None:
                console.note(
                    f"training on the responses in {source.folder}; without engines, nothing is evaluated"
                )
                rollouts, held_out = ReplayGroups(source), []
            else:
                pool = start_engines(config, config.model.path, machine, console.note, trainer.placement)
                stack.callback(pool.shutdown)
                scorers = start_scorers(config, config.model.path, console.note)
                stack.callback(scorers.shutdown)
                watch = AllWrongWatch(decode, console.note)
                collector = make_collector(config, train_set, pool, scorers, watch)
                rollouts = LiveGroups(
                    config, collector, pool, scorers, trainer, console, lambda: check_stop(stop)
                )
                if not held_out:
                    console.note(
                        "there are no held-out problems (data.evaluation_path), so nothing is evaluated"
                    )
            trackers = Trackers(
                config.tracking, directory.path, asdict(config), directory.path.name, log=console.note
            )
            stack.callback(trackers.close)
            stack.callback(write_report_of, directory.path, console)
            components = LoopComponents(
                trainer, rollouts, held_out, decode, pad_id(tokenizer), console, trackers, stop
            )
            try:
                Loop(config, directory, components).run()
            except Interrupted as interrupted:
                if isinstance(interrupted.__cause__, UserError):
                    raise interrupted.__cause__ from None
                return stop.exit_code
            export_model(trainer, Path(config.model.path).resolve(), directory.path / MODEL)
        summarize(directory.path, console)
    return 0


def load_inputs(
    config: Config, directory: RunDirectory, tokenizer: Any, log: Callable[[str], None]
) -> tuple[Dataset, list[Problem], RunInputs]:
    """Training and held-out problems, and what identifies the run's inputs when it resumes.

    A chat template prints the time of the first start in every resumed run.
    """
    prompt_time = directory.prompt_time() or datetime.now().replace(microsecond=0)
    if prints_date(tokenizer):
        log(f"the chat template prints the date, which stays {prompt_time:%Y-%m-%d} for this run")
    train_set, held_out = load_datasets(config, tokenizer, prompt_time, log)
    files = model_files(Path(config.model.path))
    inputs = RunInputs(files, train_set.fingerprint, fingerprint(held_out), prompt_time.isoformat())
    return train_set, held_out, inputs


def start_trainer(config: Config, machine: Machine) -> RLTrainer:
    """The trainer's ranks with the model built and loaded."""
    share = 1 - COLOCATED_GPU_SHARE if config.rollout.placement == "colocated" else 1.0
    return RLTrainer(with_absolute_paths(config), int(machine.gpus > 0), share)


def make_collector(
    config: Config, train_set: Dataset, pool: EnginePool, scorers: ScorerPool, watch: AllWrongWatch
) -> Collector:
    """Dynamic sampling of the training problems, scored by the configured reward."""
    overlong = Overlong(
        config.rollout.max_response_length, config.reward.overlong_buffer, config.reward.overlong_factor
    )
    return Collector(
        train_set,
        pool,
        scorers,
        watch,
        config.rollout,
        overlong,
        target_groups=config.batch.prompts_per_iteration,
        responses_per_prompt=config.batch.responses_per_prompt,
        seed=config.seed,
    )


def with_absolute_paths(config: Config) -> Config:
    """The same settings for ranks, which run in other folders and on other machines that share the file system."""
    model = replace(config.model, path=str(Path(config.model.path).resolve()))
    return replace(config, model=model, run_dir=str(Path(config.run_dir).resolve()))
