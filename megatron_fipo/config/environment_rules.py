"""Checks of the settings about the cluster: its address, and the variables of processes on it."""

import re

from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError

OWN_VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "Megatron-Core needs 1, which each rank sets",
    "CUDA_VISIBLE_DEVICES": "Ray gives each process its GPUs",
    "OMP_NUM_THREADS": "each process has the threads of its CPUs in Ray",
    "CUBLAS_WORKSPACE_CONFIG": "deterministic=true sets it",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "deterministic=true sets it",
    "TMPDIR": "it is that of each node",
    "PYTHONPATH": "each node has the package installed",
    "LD_PRELOAD": "it would load code into every process; set it where Ray starts",
    "MASTER_ADDR": "ranks meet where rank 0 runs",
    "MASTER_PORT": "ranks meet at a free port of rank 0",
    "RANK": "the run numbers its ranks",
    "LOCAL_RANK": "the run numbers its ranks",
    "WORLD_SIZE": "it follows from the sizes of `parallel`",
    "VLLM_HOST_IP": "it is the address of each node in the Ray cluster",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "the engine chooses it",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "checkpoints are read as data alone",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "checkpoints are read as data alone",
}
"""Variables that `env` cannot set, each with the reason."""
OWN_PREFIXES = {
    "RAY_": "Ray reads it where it starts on each node; set it there",
    "MEGATRON_FIPO_": "it is this package's own",
}
_ADDRESS = re.compile(r"[^\s/@:]+:\d+|\[[0-9a-fA-F:]+\]:\d+|auto")


def check_environment(config: Config) -> None:
    """Refuse variables that belong to this package or to Ray, and an address that may have credentials. UserError."""
    for name in config.env:
        reason = OWN_VARIABLES.get(name) or next(
            (reason for prefix, reason in OWN_PREFIXES.items() if name.startswith(prefix)), None
        )
        if reason is not None:
            raise UserError(f"env.{name} cannot be set: {reason}")
    if config.env.get("NCCL_ALGO") not in (None, "Ring") and config.deterministic:
        raise UserError("env.NCCL_ALGO cannot be set with deterministic=true, which needs Ring; remove one")
    if config.ray_address is not None and not _ADDRESS.fullmatch(config.ray_address):
        raise UserError("ray_address must be HOST:PORT of a Ray cluster, without a protocol, user or path")
