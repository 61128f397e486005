"""Megatron-Core's process groups: created once per process and destroyed at its end."""

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_fipo.config import ParallelConfig
from megatron_fipo.errors import UserError


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Create all process groups and seed the random trackers.

    torch.distributed must be initialized, one process per rank.

    Collective over the world: every rank calls it with the same arguments. Rank order is tensor, context,
    data, pipeline (fastest first); for experts expert-tensor, expert, expert-data, pipeline. UserError if the
    number of processes is not the product of the parallel sizes.
    """
    if dist.get_world_size() != parallel.world_size:
        raise UserError(
            f"the parallel sizes multiply to {parallel.world_size} ranks, but {dist.get_world_size()} were "
            "started; change parallel.data_parallel_size or the number of ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Destroy the process groups.

    `initialize` may be called again in the same process; torch.distributed stays initialized.
    """
    parallel_state.destroy_model_parallel()
