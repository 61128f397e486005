"""Put a run together and take it apart: Ray, trainer ranks, engines, data, logs."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from megatron_fipo.config import Config, Machine, validate
from megatron_fipo.data.registry import load_datasets, load_evaluation
from megatron_fipo.errors import UserError
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
    directory = RunDirectory(Path(config.run_dir))
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    train_set, held_out = load_datasets(config.data, config.rollout.max_prompt_length, tokenizer, config.seed)
    directory.claim(config)
    with Console(config.iterations) as console, ray_cluster(config) as machine:
        validate(config, architecture, machine)
        console.phase("starting")
        trainer = TrainerGroup(TrainerWorker, config.parallel.world_size, int(machine.gpus > 0), config=config)
        pool = start_engines(config, config.model.path, machine)
        trackers = Trackers(config.tracking, directory.path, resolved(config), directory.path.name, say=console.note)
        decode = decoder(tokenizer)
        parts = Parts(
            trainer, pool, train_set, held_out, scorer(config.reward.name), decode, pad_id(tokenizer), console, trackers
        )
        loop = Loop(config, directory, parts)
        try:
            with stop_on_signal(loop, console):
                loop.run()
            export_model(trainer, Path(config.model.path), directory.path / "model")
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            pool.shutdown()
            trainer.shutdown()
            if (directory.path / "metrics.jsonl").exists():
                write_report(directory.path)
            trackers.close()
        evaluations = [record.values for record in read_metrics(directory.path) if record.kind == "evaluation"]
        console.summary(
            evaluations[0] if evaluations else None,
            evaluations[-1] if evaluations else None,
            directory.path / "report.html",
            directory.path / "model",
        )


def evaluate(model_dir: str, config: Config) -> None:
    """`megatron-fipo evaluate`: held-out accuracy of a Hugging Face folder; prints it and writes a table per response."""
    tokenizer = load_tokenizer(model_dir, config.model.trust_remote_code)
    held_out = load_evaluation(config.data, config.rollout.max_prompt_length, tokenizer, config.seed)
    with Console(0) as console, ray_cluster(config) as machine:
        console.phase("evaluation")
        pool = start_engines(config, model_dir, machine)
        try:
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
        finally:
            pool.shutdown()
        console.evaluation(0, evaluation.values)
        table = Path(config.run_dir) / "evaluation.jsonl"
        write_table(table, evaluation.table)
        console.note(f"every response and its score: {table}")


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face folder. Raises `UserError` where it can't be read."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"model folder {folder} does not exist; give model.path a folder in Hugging Face format.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a tokenizer from {folder}: {str(error).splitlines()[0]}") from error


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


@contextmanager
def ray_cluster(config: Config) -> Iterator[Machine]:
    """Join `config.ray_address`, or start a cluster on this machine that is just large enough and ends with the run.

    Gives what ranks and engines may use: of the whole cluster in the first case, of this machine in the second.
    """
    machine = this_machine()
    environment = {} if machine.gpus else {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "error"}
    if config.ray_address:
        ray.init(address=config.ray_address, **options)
        resources = ray.cluster_resources()
        machine = Machine(cpus=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)))
    else:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        workers = config.parallel.world_size + config.rollout.num_engines
        store_mb = OBJECT_STORE_BASE_MB + BUCKETS_IN_STORE * config.rollout.weight_bucket_mb
        ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=store_mb * 2**20, **options)
    try:
        yield machine
    finally:
        ray.shutdown()


@contextmanager
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
    shutil.rmtree(fresh, ignore_errors=True)
    trainer.call("export_hf", str(source), str(fresh))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def resolved(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, for trackers."""
    return asdict(config)
