"""Put a run together and take it apart: Ray, trainer ranks, engines, data, logs."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, Machine, validate
from megatron_fipo.driver.cluster import run_cluster, start_engines
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.evaluation import evaluate as evaluate_problems
from megatron_fipo.driver.loop import Loop, Parts, check_stop, write_table
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.dump import DumpFolder
from megatron_fipo.driver.rollout.engine_actors import COLOCATED_GPU_SHARE
from megatron_fipo.driver.rollout.group_source import GroupSource, Interrupted, LiveGroups, ReplayGroups
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.prompt_group import GroupScorer
from megatron_fipo.driver.stop import Stop
from megatron_fipo.driver.tracking import Trackers
from megatron_fipo.driver.trainer_group import TrainerGroup
from megatron_fipo.engine.registry import engine_type
from megatron_fipo.environment.machine import this_machine
from megatron_fipo.errors import UserError, first_line, writing
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.report import write_report
from megatron_fipo.run_dir.metrics_log import read_metrics
from megatron_fipo.run_dir.run_directory import RunDirectory
from megatron_fipo.tasks.data_sources import load_datasets, load_evaluation
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.scorers import scorer
from megatron_fipo.trainer.rl_worker import TrainerWorker


def train(config: Config, allow_change: Sequence[str] = (), replay: Path | None = None) -> int:
    """`megatron-fipo train`: run or continue `config`, then write model and report. Returns the exit code (see `driver/stop.py`)."""
    architecture = read_architecture(Path(config.model.path))
    validate(config, architecture, None if config.ray_address else this_machine())
    source = (
        None if replay is None else DumpFolder(replay, config.rollout.temperature, architecture.vocab_size)
    )
    if source is None:
        engine_type(config.rollout.engine).load()  # refuses before anything is written
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    with Console(config.iterations) as console:
        train_set, held_out = load_datasets(
            config.data, config.rollout.max_prompt_length, tokenizer, config.seed, console.note
        )
        directory = RunDirectory(Path(config.run_dir).resolve())
        for change in directory.claim(config, allow_change):
            console.note(change)
        console.phase("starting")
        with run_cluster(config, architecture) as machine, contextlib.ExitStack() as stack:
            validate(config, architecture, machine)
            stop = stack.enter_context(
                Stop(config.max_walltime_minutes, console.note)
            )  # after Ray, which has handlers of its own
            trainer = start_trainer(config, machine)
            stack.callback(trainer.shutdown)
            for line in trainer.call("describe")[0]:
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
                collector = make_collector(config, train_set, pool, tokenizer)
                rollouts = LiveGroups(config, collector, pool, trainer, console, lambda: check_stop(stop))
                if not held_out:
                    console.note(
                        "there are no held-out problems (data.evaluation_path), so nothing will be evaluated"
                    )
            trackers = Trackers(
                config.tracking, directory.path, asdict(config), directory.path.name, say=console.note
            )
            stack.callback(trackers.close)
            stack.callback(report, directory.path, console)
            score, text = scorer(config.reward.name), decoder(tokenizer)
            parts = Parts(
                trainer, rollouts, held_out, score, text, pad_id(tokenizer), console, trackers, stop
            )
            try:
                Loop(config, directory, parts).run()
            except Interrupted as interrupted:
                if isinstance(interrupted.__cause__, UserError):
                    raise interrupted.__cause__ from None
                return stop.exit_code
            export_model(trainer, Path(config.model.path).resolve(), directory.path / "model")
        summarise(directory.path, console)
    return 0


def start_trainer(config: Config, machine: Machine) -> TrainerGroup:
    """The trainer's ranks with the model built and loaded."""
    share = 1 - COLOCATED_GPU_SHARE if config.rollout.placement == "colocated" else 1.0
    gpus = int(machine.gpus > 0)
    return TrainerGroup(
        TrainerWorker, config.parallel.world_size, gpus, gpu_share=share, config=with_absolute_paths(config)
    )


def make_collector(config: Config, train_set: Dataset, pool: EnginePool, tokenizer: Any) -> Collector:
    """Dynamic sampling of the training problems, scored by the configured reward."""
    score_group = GroupScorer(
        scorer(config.reward.name),
        decoder(tokenizer),
        config.rollout.max_response_length,
        config.reward.overlong_buffer,
        config.reward.overlong_factor,
    )
    return Collector(
        train_set,
        pool,
        score_group,
        config.rollout,
        target_groups=config.batch.prompts_per_iteration,
        responses_per_prompt=config.batch.responses_per_prompt,
        seed=config.seed,
    )


def report(run_dir: Path, console: Console) -> None:
    """Write the report of whatever there is. A report that fails is said and hides no other error."""
    if not read_metrics(run_dir):
        return
    try:
        write_report(run_dir)
    except (OSError, UserError) as error:
        console.note(f"the report could not be written: {error}")


def summarise(run_dir: Path, console: Console) -> None:
    """What became of the sampled tokens, and the table of held-out accuracy, at the end of a run."""
    records = read_metrics(run_dir)
    iterations = [record.values for record in records if record.kind == "iteration"]
    generated = sum(values["tokens/generated"] for values in iterations)
    if generated:
        used, filtered = (
            sum(values[f"tokens/{name}"] for values in iterations) / generated
            for name in ("used", "filtered")
        )
        console.note(
            f"of the sampled tokens {used:.1%} were trained on and {filtered:.1%} belonged to groups all right or all wrong; "
            f"{iterations[-1]['rollout/unused_share']:.1%} of the informative responses went unused"
        )
    evaluations = {record.iteration: record.values for record in records if record.kind == "evaluation"}
    before, after = evaluations.get(0), evaluations.get(max(evaluations)) if evaluations else None
    console.summary(before, after, run_dir / "report.html", run_dir / "model")


def evaluate(model_dir: str, config: Config, output: Path) -> None:
    """`megatron-fipo evaluate`: held-out accuracy of a Hugging Face folder; prints it and writes every response to `output`."""
    tokenizer = load_tokenizer(model_dir, config.model.trust_remote_code)
    with Console(0) as console:
        held_out = load_evaluation(
            config.data, config.rollout.max_prompt_length, tokenizer, config.seed, console.note
        )
        console.phase("evaluation")
        with (
            run_cluster(config, read_architecture(Path(model_dir))) as machine,
            contextlib.ExitStack() as stack,
        ):
            pool = start_engines(config, model_dir, machine, console.note)
            stack.callback(pool.shutdown)
            evaluation = evaluate_problems(
                pool.generate,
                held_out,
                scorer(config.reward.name),
                decoder(tokenizer),
                config.evaluation,
                max_new_tokens=config.rollout.max_response_length,
                seed=config.seed,
            )
        console.evaluation(0, evaluation.values)
        write_table(output, evaluation.table)
        console.note(f"every response and its score: {output}")


def with_absolute_paths(config: Config) -> Config:
    """The same settings for ranks, which run in other folders, on a cluster on other machines (that share the file system)."""
    model = replace(config.model, path=str(Path(config.model.path).resolve()))
    return replace(config, model=model, run_dir=str(Path(config.run_dir).resolve()))


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face folder. Raises `UserError` where it can't be read."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"model folder {folder} does not exist; give model.path a folder in Hugging Face format."
        )
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # what a damaged tokenizer.json raises depends on where the damage is
        raise UserError(
            f"cannot read the tokenizer in {folder} ({first_line(error)}); restore tokenizer.json and tokenizer_config.json"
        ) from error


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text without special tokens."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def pad_id(tokenizer: Any) -> int:
    """Padding never reaches the loss; any valid id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def export_model(trainer: TrainerGroup, source: Path, target: Path) -> None:
    """Write the weights beside an older export, then take its place."""
    fresh = target.with_name(target.name + "-new")
    with writing(target):
        for leftover in (fresh, *target.parent.glob(f".{fresh.name}.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        trainer.call("export_hf", str(source), str(fresh))
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
