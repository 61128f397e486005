"""The start of every trainer rank: join the process group, set up the parallel groups, build its shard of the model."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import math
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.batching.shard import PackedShard, build_shard
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.environment import BF16_PEAK_FLOPS, Accelerators, find_accelerators, installed_version
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.layer_spec import choose_layer_spec
from megatron_fipo.model.mcore import ADAM
from megatron_fipo.network import host_and_port, interface_of, listen, node_address, socket_variables
from megatron_fipo.objective.kernels.choice import describe_kernels
from megatron_fipo.trainer.active import RankFacts, active_lines
from megatron_fipo.trainer.protocol import RankSettings, TrainerRank
from megatron_fipo.trainer.rank_model import RankModel

COLLECTIVE_TIMEOUT_S = 1800.0
"""Seconds a rank waits for the others, in addition to their wait for the engines.

Only for a group whose driver is gone: while it watches, heartbeats notice a hanging group sooner. Not shorter, because the
others wait this long in one collective while a rank that makes progress reads a checkpoint from a slow disk.
"""


class MegatronRank(TrainerRank):
    """A rank: `rendezvous` (rank 0), `setup`, then methods of a subclass, each called on all ranks together."""

    def __init__(self, rank: int, world_size: int, settings: RankSettings) -> None:
        self.rank = rank
        self.world_size = world_size
        self.settings = settings
        # Megatron-Core needs this launch order to overlap tensor-parallel communication with GEMMs.
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._listener: socket.socket | None = None
        """Of rank 0, between `rendezvous` and `setup`."""

    def accelerators(self) -> Accelerators:
        """The GPU that this rank sees, and the packages for it."""
        return find_accelerators()

    def rendezvous(self) -> str:
        """Listen for the other ranks on this rank's node. Returns address and port, for `setup`."""
        self._listener = listen(node_address())
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def setup(self, rendezvous: str) -> None:
        """Join the process group, build the model and take the starting weights."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            watch_nccl(self.settings.stall_timeout_s)
        else:
            torch.set_num_threads(1)
        if self.settings.deterministic:
            be_deterministic()
        os.environ |= socket_variables(interface_of(node_address()), os.environ)
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S + self.settings.outside_wait_s)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=self._store(rendezvous, timeout),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        self.build()

    def _store(self, rendezvous: str, timeout: timedelta) -> dist.TCPStore:
        """The ranks' store. Made here because one that torch makes listens on all interfaces."""
        host, port = host_and_port(rendezvous)
        listener = None if self._listener is None else self._listener.detach()  # the store closes it
        self._listener = None
        return dist.TCPStore(host, port, self.world_size, self.rank == 0, timeout, master_listen_fd=listener)

    def build(self) -> None:
        """The part of `setup` after the process group. UserError if this machine or the model does not fit the settings."""
        settings = self.settings
        model_parallel.initialize(settings.parallel, settings.seed)
        self.policy = RankModel(
            settings.model,
            settings.parallel,
            settings.head,
            settings.optimizer,
            settings.temperature,
            self.device,
        )
        self.policy.load_hf(Path(settings.model.path))

    def describe(self) -> list[str]:
        """What this rank runs on, a line for each part: layers, attention, FP8, optimizer, kernels."""
        settings = self.settings
        facts = RankFacts(
            device=self.device_name,
            peak_flops=self.peak_flops(),
            layer_spec=choose_layer_spec(settings.model.layer_spec, settings.model.dtype),
            transformer_engine=find_accelerators().transformer_engine,
            flash_attention=installed_version("flash_attn", "flash-attn"),
            adam=ADAM,
            fuses_gradients=self.policy.fuses_gradients,
            kernels=describe_kernels(settings.head.kernels, self.device),
        )
        return active_lines(facts, settings.model, settings.optimizer)

    @property
    def device_name(self) -> str:
        """The complete name of the GPU as CUDA reports it; `CPU` without one."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def peak_flops(self) -> float | None:
        """Dense BF16 FLOP/s of this rank's GPU; None if not known, or without a GPU."""
        return BF16_PEAK_FLOPS.get(self.device_name)

    def shards(self, micro_batches: list[list[Trajectory]], pad_token_id: int) -> list[PackedShard]:
        """This context-parallel rank's part of each micro-batch, on its device."""
        parallel = self.settings.parallel
        return [
            build_shard(
                trajectories,
                context_parallel_size=parallel.context_parallel_size,
                context_parallel_rank=parallel_state.get_context_parallel_rank(),
                length_multiple=parallel.length_multiple,
                pack_multiple=parallel.pack_multiple(self.settings.model.token_multiple),
                pad_token_id=pad_token_id,
                max_position=self.policy.modules[0].max_sequence_length,
            ).to(self.device)
            for trajectories in micro_batches
        ]

    def export_hf(self, source: str, target: str) -> None:
        """Write the weights as a Hugging Face folder, config and tokenizer from `source` (collective; rank 0 writes)."""
        from megatron_fipo.checkpoint.hf_export import save_hf

        save_hf(self.policy.modules, Path(source), Path(target))

    @property
    def reports(self) -> bool:
        """Whether this rank reports: one rank of the last stage, where all ranks have the same statistics."""
        first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        return (
            self.policy.is_last_stage
            and first_replica
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )


def watch_nccl(stall_timeout_s: float) -> None:
    """Let NCCL's watchdog end the process after an error or a timeout, with a trace of its collectives.

    A variable that the user has set stays.
    """
    for name, value in {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(math.ceil(stall_timeout_s)),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }.items():
        os.environ.setdefault(name, value)


def be_deterministic() -> None:
    """Make torch and its libraries choose deterministic algorithms, or refuse."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NCCL_ALGO"] = "Ring"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
