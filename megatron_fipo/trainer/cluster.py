"""The Ray cluster of a run, and the rollout engines on it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from megatron_fipo.config import Config, Machine
from megatron_fipo.plan.machine import this_machine
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.weight_sync import BUCKETS_IN_STORE, transport_for

OBJECT_STORE_BASE_MB = 128
"""Room in Ray's object store for trajectories; the weights on their way to the engines come on top."""


def engine_class(name: str) -> type:
    """The class behind `rollout.engine`. UserError where its library is missing or of a version that does not work."""
    if name == "vllm":
        from megatron_fipo.rollout.vllm_engine import VLLMEngine, check_vllm

        check_vllm()
        return VLLMEngine
    from megatron_fipo.rollout.local import LocalEngine

    return LocalEngine


def start_engines(
    config: Config, model_path: str, machine: Machine, say: Callable[[str], None], trainer: PlacementGroup | None = None
) -> EnginePool:
    """The configured engines. Without a `trainer` to send them weights they serve those of `model_path`."""
    rollout, model = config.rollout, config.model
    source = "Hugging Face folder"
    if trainer is not None:
        source = transport_for(rollout.engine, "cuda" if machine.gpus else "cpu", rollout.placement)
    say(f"{rollout.num_engines} {rollout.engine} engine{'s' if rollout.num_engines > 1 else ''}, weights by {source}")
    arguments: dict[str, Any] = {
        "model_path": str(Path(model_path).resolve()),
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "load_weights": trainer is None,
    }
    if rollout.engine == "vllm":
        arguments |= {
            "max_model_len": rollout.max_prompt_length + rollout.max_response_length,
            "tensor_parallel_size": rollout.engine_tensor_parallel_size,
            "gpu_memory_share": rollout.gpu_memory_share,
            "deterministic": config.deterministic,
        }
    return EnginePool(
        engine_class(rollout.engine),
        arguments,
        rollout,
        gpus_per_engine=rollout.engine_tensor_parallel_size if machine.gpus else 0,
        keep_batches=config.deterministic,
        loaded_weights_serve=trainer is None,
        trainer_placement=trainer if rollout.placement == "colocated" else None,
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
        # "local", since without an address RAY_ADDRESS or a cluster that runs on this machine would be joined.
        ray.init(address="local", num_cpus=workers, include_dashboard=False, object_store_memory=store, **options)
    try:
        yield machine
    finally:
        ray.shutdown()
