"""`megatron-fipo train`: assemble a run (Ray, trainer ranks, engines, data, logs), run it, take it apart."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, placement_note, validate, with_placement
from megatron_fipo.driver.attempt import Attempts, RunParts
from megatron_fipo.driver.cards import judge_cards, judge_machine
from megatron_fipo.driver.cluster import run_cluster
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.loop import check_stop
from megatron_fipo.driver.recovery import Recovery
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.driver.rollout.engine_actors import COLOCATED_GPU_SHARE
from megatron_fipo.driver.rollout.group_source import Interrupted
from megatron_fipo.driver.run_end import MODEL, check_export, summarize, write_report_of
from megatron_fipo.driver.scoring.rehearsal import RESPONSE, trials
from megatron_fipo.driver.stop import Stop
from megatron_fipo.driver.tokenizer import checked_tokenizer, pad_id, prints_date
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.engine.registry import engine_type
from megatron_fipo.environment import Accelerators, Machine, this_machine
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.run_dir import run_folder
from megatron_fipo.run_dir.inputs import RunInputs, model_files
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.dataset import Dataset, fingerprint
from megatron_fipo.tasks.mixture import Mixture
from megatron_fipo.tasks.registry import load_datasets
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.tasks.task import HeldOut


def train(config: Config, allow_change: Sequence[str] = (), replay: Path | None = None) -> int:
    """`megatron-fipo train`: run or resume `config`, then write model and report. Returns the exit code (`exit_codes.py`)."""
    architecture = read_architecture(Path(config.model.path))
    here = None if config.ray_address else this_machine()
    validate(config, architecture)
    notes = (
        [] if here is None else judge_machine(config, here)
    )  # its reason for no GPU comes before "needs a GPU"
    validate(config, architecture, here)
    if replay is not None and config.model.router.replay == "rollout":
        raise UserError(
            "model.router.replay=rollout needs routes, which the dumps of --replay do not have; set it to old_log_probs"
        )
    source = (
        None if replay is None else DumpFolder(replay, config.rollout.temperature, architecture.vocab_size)
    )
    if source is None:
        engine_type(config.rollout.engine).check(config)  # fails before anything is written
    tokenizer = checked_tokenizer(config.model.path, config.model.trust_remote_code)
    decode = ResponseText(tokenizer)
    with Console(config.iterations) as console:
        for note in notes:
            console.note(note)
        directory = RunDirectory(run_folder(config.run_dir))
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
            if (placed := placement_note(config, machine.gpus)) is not None:
                console.note(placed)
            config = with_placement(config, machine.gpus)
            trainer = reserve_trainer(config, machine, stop, console.note)
            stack.callback(trainer.shutdown)
            recovery = Recovery(config.recovery, stop, console.note)
            held_out = evaluated_problems(held_out, source, console.note)
            own = (
                []
                if source
                else trials(
                    config, train_set.problems, held_out, tokenizer.encode(RESPONSE, add_special_tokens=False)
                )
            )
            parts = RunParts(
                config,
                directory,
                machine,
                trainer,
                train_set,
                held_out,
                decode,
                pad_id(tokenizer),
                source,
                own,
                console,
                stop,
                recovery,
            )
            attempts = stack.enter_context(Attempts(parts))
            stack.callback(write_report_of, directory.path, console)
            try:
                recovery.run(attempts.run, directory.latest)
            except Interrupted as interrupted:
                if isinstance(interrupted.__cause__, UserError):
                    raise interrupted.__cause__ from None
                return stop.exit_code
        summarize(directory.path, console)
    return 0


def load_inputs(
    config: Config, directory: RunDirectory, tokenizer: Any, log: Callable[[str], None]
) -> tuple[Dataset | Mixture, HeldOut, RunInputs]:
    """Training and held-out problems, and what identifies the run's inputs when it resumes.

    A chat template prints the time of the first start in every resumed run.
    """
    prompt_time = directory.prompt_time() or datetime.now().replace(microsecond=0)
    if prints_date(tokenizer):
        log(f"the chat template prints the date, which stays {prompt_time:%Y-%m-%d} for this run")
    train_set, held_out = load_datasets(config, tokenizer, prompt_time, log)
    files = model_files(Path(config.model.path))
    sets = {name: fingerprint(problems) for name, problems in held_out.items()}
    inputs = RunInputs(files, train_set.fingerprint, sets, prompt_time.isoformat())
    return train_set, held_out, inputs


def evaluated_problems(held_out: HeldOut, source: DumpFolder | None, log: Callable[[str], None]) -> HeldOut:
    """The held-out problems that can be evaluated; logs why there are none."""
    if source is not None:
        log(f"training on the responses in {source.folder}; without engines, nothing is evaluated")
        return {}
    if not held_out:
        log("there are no held-out problems (evaluation.sets), so nothing is evaluated")
    return held_out


def reserve_trainer(config: Config, machine: Machine, stop: Stop, log: Callable[[str], None]) -> RLTrainer:
    """The resources of the trainer's ranks, which an attempt starts.

    Of a cluster that the run has joined, only the ranks know the GPUs: they are judged once the ranks have started.
    """

    def judge(found: list[Accelerators]) -> None:
        for note in judge_cards(config, found):
            log(note)

    share = 1 - COLOCATED_GPU_SHARE if config.rollout.colocated else 1.0
    return RLTrainer(
        with_absolute_paths(config),
        int(machine.gpus > 0),
        share,
        lambda: check_stop(stop),
        judge if machine.accelerators is None else None,
    )


def with_absolute_paths(config: Config) -> Config:
    """The same settings for ranks, which run in other folders and on other machines that share the file system."""
    model = replace(config.model, path=str(Path(config.model.path).resolve()))
    return replace(config, model=model, run_dir=str(run_folder(config.run_dir)))
