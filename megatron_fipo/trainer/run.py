"""Put a run together and take it apart: Ray, trainer ranks, engines, data, logs."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from megatron_fipo.config import Config, Machine, validate
from megatron_fipo.data.registry import load_datasets, load_evaluation
from megatron_fipo.errors import UserError, writing
from megatron_fipo.model.families import read_architecture
from megatron_fipo.plan.machine import this_machine
from megatron_fipo.reward.registry import scorer
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.trainer.console import Console
from megatron_fipo.trainer.evaluation import evaluate as evaluate_problems
from megatron_fipo.trainer.group import TrainerGroup
from megatron_fipo.trainer.loop import Interrupted, Loop, Parts, write_table
from megatron_fipo.trainer.metrics_log import read_metrics
from megatron_fipo.trainer.report import write_report
from megatron_fipo.trainer.state import RunDirectory
from megatron_fipo.trainer.tracking import Trackers
from megatron_fipo.trainer.worker import TrainerWorker

OBJECT_STORE_BASE_MB = 128
"""Room in Ray's object store for trajectories; the weights on their way to the engines come on top."""
BUCKETS_IN_STORE = 3
"""Two in flight (`weight_sync.BUCKETS_IN_FLIGHT`) and one being made."""


def train(config: Config) -> None:
    """`megatron-fipo train`: run or continue `config`, then write model and report. Raises `KeyboardInterrupt` when stopped."""
    architecture = read_architecture(Path(config.model.path))
    validate(config, architecture, None if config.ray_address else this_machine())
    engine_class(config.rollout.engine)  # refuses before anything is written
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    with Console(config.iterations) as console:
        train_set, held_out = load_datasets(config.data, config.rollout.max_prompt_length, tokenizer, config.seed, console.note)
        directory = RunDirectory(Path(config.run_dir).resolve())
        directory.claim(config)
        console.phase("starting")
        with run_cluster(config) as machine, contextlib.ExitStack() as stack:
            validate(config, architecture, machine)
            trainer = TrainerGroup(
                TrainerWorker, config.parallel.world_size, int(machine.gpus > 0), config=with_absolute_paths(config)
            )
            stack.callback(trainer.shutdown)
            pool = start_engines(config, config.model.path, machine)
            stack.callback(pool.shutdown)
            trackers = Trackers(config.tracking, directory.path, asdict(config), directory.path.name, say=console.note)
            stack.callback(trackers.close)
            stack.callback(report, directory.path, console)
            parts = Parts(
                trainer,
                pool,
                train_set,
                held_out,
                scorer(config.reward.name),
                decoder(tokenizer),
                pad_id(tokenizer),
                console,
                trackers,
            )
            loop = Loop(config, directory, parts)
            with stop_on_signal(loop, console):
                run_to_the_end(loop)
                export_model(trainer, Path(config.model.path).resolve(), directory.path / "model")
        summarise(directory.path, console)


def run_to_the_end(loop: Loop) -> None:
    """Run the loop; where it stops early, raise why: the user's Ctrl-C, or the sentence that stopped it."""
    try:
        loop.run()
    except Interrupted as stop:
        if isinstance(stop.__cause__, UserError):
            raise stop.__cause__ from None
        raise KeyboardInterrupt from None


def report(run_dir: Path, console: Console) -> None:
    """Write the report of whatever there is. A report that fails is said and hides no other error."""
    if not read_metrics(run_dir):
        return
    try:
        write_report(run_dir)
    except (OSError, UserError) as error:
        console.note(f"the report could not be written: {error}")


def summarise(run_dir: Path, console: Console) -> None:
    """The table at the end of a run."""
    evaluations = {record.iteration: record.values for record in read_metrics(run_dir) if record.kind == "evaluation"}
    before, after = evaluations.get(0), evaluations.get(max(evaluations)) if evaluations else None
    console.summary(before, after, run_dir / "report.html", run_dir / "model")


def evaluate(model_dir: str, config: Config, output: Path) -> None:
    """`megatron-fipo evaluate`: held-out accuracy of a Hugging Face folder; prints it and writes every response to `output`."""
    tokenizer = load_tokenizer(model_dir, config.model.trust_remote_code)
    with Console(0) as console:
        held_out = load_evaluation(config.data, config.rollout.max_prompt_length, tokenizer, config.seed, console.note)
        console.phase("evaluation")
        with run_cluster(config) as machine, contextlib.ExitStack() as stack:
            pool = start_engines(config, model_dir, machine)
            stack.callback(pool.shutdown)
            evaluation = evaluate_problems(
                pool,
                held_out,
                scorer(config.reward.name),
                decoder(tokenizer),
                config.evaluation,
                max_new_tokens=config.rollout.max_response_length,
                seed=config.seed,
                version=0,
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
        raise UserError(f"model folder {folder} does not exist; give model.path a folder in Hugging Face format.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # what a damaged tokenizer.json raises depends on where the damage is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the tokenizer in {folder} ({reason}); restore tokenizer.json and tokenizer_config.json"
        ) from error


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text without special tokens."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def pad_id(tokenizer: Any) -> int:
    """Padding never reaches the loss; any valid id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def engine_class(name: str) -> type:
    """The class behind `rollout.engine`."""
    if name == "vllm":
        raise UserError("rollout.engine=vllm is not part of this version; use rollout.engine=local")
    from megatron_fipo.rollout.local import LocalEngine

    return LocalEngine


def start_engines(config: Config, model_path: str, machine: Machine) -> EnginePool:
    """The configured engines with the weights of `model_path`, loaded."""
    rollout, model = config.rollout, config.model
    return EnginePool(
        engine_class(rollout.engine),
        {"model_path": str(Path(model_path).resolve()), "dtype": model.dtype, "trust_remote_code": model.trust_remote_code},
        rollout.num_engines,
        max_retries=rollout.max_retries,
        timeout_s=rollout.timeout_s,
        gpus_per_engine=int(machine.gpus > 0),
    )


def run_cluster(config: Config) -> contextlib.AbstractContextManager[Machine]:
    """The Ray cluster that a run of `config` needs."""
    workers = config.parallel.world_size + config.rollout.num_engines
    return ray_cluster(config.ray_address, workers=workers, weights_mb=BUCKETS_IN_STORE * config.rollout.weight_bucket_mb)


@contextlib.contextmanager
def ray_cluster(address: str | None, *, workers: int, weights_mb: int) -> Iterator[Machine]:
    """Join the cluster at `address`, or start one on this machine that is just large enough and ends with the run.

    Gives what ranks and engines may use: of the whole cluster in the first case, of this machine in the second.
    """
    machine = this_machine()
    # One connection keeps CUDA's order of launches, by which Megatron-Core overlaps tensor-parallel communication with products.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if machine.gpus else {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "error"}
    if address:
        ray.init(address=address, **options)
        resources = ray.cluster_resources()
        machine = Machine(cpus=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)))
    else:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        store = (OBJECT_STORE_BASE_MB + weights_mb) * 2**20
        ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=store, **options)
    try:
        yield machine
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stop_on_signal(loop: Loop, console: Console) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks the loop to save and stop, the second stops at once."""

    def handle(number: int, _frame: Any) -> None:
        if loop.stop_requested:
            raise KeyboardInterrupt
        loop.stop_requested = True
        console.note("stopping at the next safe point (again to stop at once, losing the work since the last checkpoint)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def export_model(trainer: TrainerGroup, source: Path, target: Path) -> None:
    """Write the weights beside an older export, then take its place."""
    fresh = target.with_name(target.name + "-new")
    with writing(target):
        for leftover in (fresh, *target.parent.glob(f".{fresh.name}.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        trainer.call("export_hf", str(source), str(fresh))
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
