"""The Ray cluster of a run, and the rollout engines, scorers and environments on it."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup

from megatron_fipo.config import Config
from megatron_fipo.driver.cluster_loss import ERROR_DELAY_S, check_cluster, is_lost
from megatron_fipo.driver.joined_cluster import watching
from megatron_fipo.driver.own_cluster import OwnCluster
from megatron_fipo.driver.ray_access import OPTIONS, loopback_as_written, need_any_token, own_token
from megatron_fipo.driver.ray_storage import (
    RAY_FOLDER,
    check_shared_memory,
    make_session_folder,
    remove_session_folder,
    worker_variables,
)
from megatron_fipo.driver.rollout.environments import EnvironmentPool
from megatron_fipo.driver.rollout.episode_pool import EpisodePool
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.scoring.pool import ScorerPool
from megatron_fipo.driver.scoring.rehearsal import Trial, rehearse
from megatron_fipo.engine.registry import engine_type
from megatron_fipo.environment import HUB_OFFLINE, Machine, this_machine
from megatron_fipo.environments.actor import EnvironmentActor
from megatron_fipo.environments.protocol import WorkerSettings
from megatron_fipo.errors import RAY_LOGS_VARIABLE, UserError, first_line
from megatron_fipo.families.family import Architecture
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.scorer.actor import ScorerActor
from megatron_fipo.scorer.protocol import ScorerSettings
from megatron_fipo.tasks.task import Problem
from megatron_fipo.weight_sync.transport import BUCKETS_IN_STORE, transport_for

OBJECT_STORE_BASE_BYTES = 128 * 2**20
"""Object-store memory besides weights and trajectories."""
STORED_BYTES_PER_TOKEN = 17
"""An engine's reply (id and log-prob, 8), and the share of the ranks that train on it (also the mask, 9)."""


def start_engines(
    config: Config,
    model_path: str,
    machine: Machine,
    log: Callable[[str], None],
    trainer: PlacementGroup | None = None,
) -> EnginePool:
    """The configured engines. Without a `trainer` that sends them weights they serve those in `model_path`."""
    rollout = config.rollout
    source = "Hugging Face folder"
    if trainer is not None:
        source = transport_for(rollout.engine, "cuda" if machine.gpus else "cpu", rollout.colocated)
    log(
        f"{rollout.num_engines} {rollout.engine} engine{'s' if rollout.num_engines > 1 else ''}, weights by {source}"
    )
    engine, architecture = engine_type(rollout.engine), read_architecture(Path(model_path))
    experts = architecture.experts
    return EnginePool(
        engine.load(),
        engine.arguments(config, model_path, load_weights=trainer is None),
        rollout,
        vocab_size=architecture.vocab_size,
        route_shape=None if experts is None else (architecture.num_layers, experts.per_token),
        gpus_per_engine=rollout.engine_tensor_parallel_size if machine.gpus else 0,
        keep_batches=config.deterministic,
        placement_timeout_s=config.placement_timeout_s,
        loaded_weights_serve=trainer is None,
        trainer_placement=trainer if trainer is not None and rollout.colocated else None,
    )


def start_scorers(
    config: Config, model_path: str, rewards: tuple[str, ...], log: Callable[[str], None]
) -> ScorerPool:
    """The processes that score responses of the model in `model_path` by these rewards, as `reward.name` writes them."""
    reward, settings = config.reward, ScorerSettings.of(config, model_path, rewards)
    log(
        f"{reward.scorers} scorer{'s' if reward.scorers > 1 else ''} ({', '.join(rewards)}; {reward.timeout_s:g} s and "
        f"{reward.memory_mb:,} MB per response)"
    )
    return ScorerPool(
        ScorerActor, settings, reward.scorers, max_failure_share=reward.max_failure_share, log=log
    )


def try_rewards(config: Config, model_path: str, trials: Sequence[Trial], log: Callable[[str], None]) -> None:
    """Try the rewards that the user brings, on every node (`rehearse`)."""
    rewards = tuple(sorted({trial.request.problem.task.reward for trial in trials}))
    rehearse(ScorerActor, ScorerSettings.of(config, model_path, rewards), trials, log)


def start_environments(
    config: Config,
    model_path: str,
    environments: dict[str, Problem],
    engines: EnginePool,
    log: Callable[[str], None],
) -> EpisodePool:
    """The processes of these environments (import paths, each with a problem to try it with), in front of the engines.

    Returns once they have loaded. Raises `UserError` if one cannot be used.
    """
    environment = config.environment
    log(
        f"{environment.workers} environment worker{'s' if environment.workers > 1 else ''} ({', '.join(environments)}; "
        f"{environment.timeout_s:g} s per answer, {environment.memory_mb:,} MB per process, at most {environment.max_turns} turns)"
    )
    settings = WorkerSettings(
        str(Path(model_path).resolve()),
        config.model.trust_remote_code,
        environments,
        os.getcwd(),
        environment.max_observation_tokens,
        environment.timeout_s,
        environment.memory_mb,
    )
    workers = EnvironmentPool(
        EnvironmentActor,
        settings,
        environment.workers,
        max_failure_share=environment.max_failure_share,
        log=log,
    )
    try:
        workers.wait_until_loaded()
    except UserError:
        workers.shutdown()
        raise
    return EpisodePool(engines, workers, environment, lockstep=config.deterministic)


def run_cluster(
    config: Config, architecture: Architecture, log: Callable[[str], None]
) -> contextlib.AbstractContextManager[Machine]:
    """The Ray cluster that a run of `config` needs."""
    return ray_cluster(
        config.ray_address,
        workers=config.parallel.world_size + config.rollout.num_engines,
        log=log,
        store_bytes=object_store_bytes(config, architecture),
        environment=config.env,
    )


def object_store_bytes(config: Config, architecture: Architecture) -> int:
    """Object-store memory for weights on the way to the engines and the longest iteration on the way to the ranks.

    A tensor larger than a bucket is sent alone: the embedding is the largest. Beyond a third of the memory Ray spills to
    disk.
    """
    embedding = (
        architecture.vocab_size * architecture.hidden_size * (2 if config.model.dtype == "bfloat16" else 4)
    )
    buckets = BUCKETS_IN_STORE * max(config.rollout.weight_bucket_mb * 2**20, embedding)
    responses = config.batch.prompts_per_iteration * config.batch.responses_per_prompt
    tokens = responses * config.rollout.longest_sequence
    needed = OBJECT_STORE_BASE_BYTES + buckets + tokens * STORED_BYTES_PER_TOKEN
    return min(needed, psutil.virtual_memory().total // 3)


@contextlib.contextmanager
def ray_cluster(
    address: str | None,
    *,
    workers: int,
    log: Callable[[str], None],
    store_bytes: int = OBJECT_STORE_BASE_BYTES,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Join the cluster at `address`, or start one on this machine with just enough CPUs that ends with the run.

    Yields what ranks and engines may use: the complete cluster in the first case, this machine in the second. What
    variables they need they set by themselves, since they may run on another kind of machine; `environment` (`env`) comes in
    addition. Raises
    `UserError` if Ray cannot start or be joined, or (`ClusterLostError`) if the cluster ends before the run does.
    """
    variables = {HUB_OFFLINE: os.environ.setdefault(HUB_OFFLINE, "1"), **(environment or {})}
    with contextlib.ExitStack() as stack:
        if address:
            need_any_token()
            stack.enter_context(logs_in(connect(address, variables)))
            stack.enter_context(watching(ray.get_runtime_context().gcs_address))
            resources = ray.cluster_resources()
            machine = Machine(
                cpus=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)), may_grow=True
            )
        else:
            machine = this_machine()
            own = stack.enter_context(own_cluster(workers, store_bytes, log))
            with loopback_as_written():
                connect(own, variables | worker_variables(os.environ))
        try:
            yield machine
        except UserError:
            raise
        except Exception:
            check_cluster(ERROR_DELAY_S)  # whatever fails without Ray fails for that reason
            raise
        finally:
            if not is_lost():
                ray.shutdown()


@contextlib.contextmanager
def own_cluster(workers: int, store_bytes: int, log: Callable[[str], None]) -> Iterator[str]:
    """The address of a cluster on this machine that ends with the context.

    Its files are removed at the end; only its logs stay if the error that leaves the context names them.
    """
    check_shared_memory(store_bytes, log)
    folder = make_session_folder(os.environ, log)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    keep_logs = False
    try:
        with logs_in(folder / RAY_FOLDER / "session_latest/logs"), own_token(folder):
            cluster = OwnCluster(
                folder,
                log,
                **OPTIONS,
                num_cpus=workers,
                include_dashboard=False,
                object_store_memory=store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            try:
                yield cluster.address
            finally:
                cluster.end()
    except Exception as error:
        keep_logs = str(folder) in str(error) or not isinstance(error, UserError)
        raise
    finally:
        remove_session_folder(folder, keep_logs=keep_logs)


@contextlib.contextmanager
def logs_in(folder: Path) -> Iterator[None]:
    """Messages of this process, and of processes that it starts, refer to Ray's logs in `folder`."""
    before = os.environ.get(RAY_LOGS_VARIABLE)
    os.environ[RAY_LOGS_VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[RAY_LOGS_VARIABLE]
        if before is not None:
            os.environ[RAY_LOGS_VARIABLE] = before


def connect(address: str, environment: dict[str, str]) -> Path:
    """Connect this process to a cluster; `environment` is that of ranks and engines. Returns the folder of Ray's logs.

    A handler of SIGTERM stays as it is.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # Of a group that ends only the first failure is read; Ray would print those of the others.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        context: Any = ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect to the Ray cluster at {address}: {first_line(error)}; check ray_address"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray installs its own
    return Path(context.address_info["session_dir"], "logs")
