"""Whether a parallel layout divides a model; used by config checks, model building and conversion."""

import math
from typing import TYPE_CHECKING

from megatron_fipo.config.schema import ParallelConfig
from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from megatron_fipo.families.family import Architecture


def check_divisibility(architecture: "Architecture", parallel: ParallelConfig) -> None:
    """Raise UserError, naming the setting, if tensor or pipeline parallelism does not divide the model. Pure.

    tensor_model_parallel_size must divide the attention heads, the key-value heads and the feed-forward
    width. pipeline_model_parallel_size times the virtual stages must divide the layers, and virtual stages
    need a pipeline. Expert parallelism: `_check_experts`.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual_stages = parallel.virtual_pipeline_model_parallel_size
    divided = {
        "attention heads": architecture.num_attention_heads,
        "key-value heads": architecture.num_query_groups,
        "feed-forward width": architecture.ffn_hidden_size,
    }
    for what, size in divided.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {size} {what}; "
                f"choose a divisor of {math.gcd(*divided.values())}"
            )
    if architecture.num_layers % (pp * (virtual_stages or 1)):
        virtual = (
            f" times parallel.virtual_pipeline_model_parallel_size={virtual_stages}" if virtual_stages else ""
        )
        raise UserError(
            f"parallel.pipeline_model_parallel_size={pp}{virtual} does not divide the model's "
            f"{architecture.num_layers} layers; choose sizes whose product divides them"
        )
    if virtual_stages and pp == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={virtual_stages} needs "
            "parallel.pipeline_model_parallel_size > 1; set it to null or raise the latter"
        )
    _check_experts(architecture, parallel)


def _check_experts(architecture: "Architecture", parallel: ParallelConfig) -> None:
    """expert_model_parallel_size must divide the experts, expert_tensor_parallel_size their width, and their product the
    ranks of a pipeline stage."""
    experts, tp = architecture.experts, parallel.tensor_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if experts is None:
        for key, size in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if size > 1:
                raise UserError(f"parallel.{key}={size} needs a model with experts; set it to 1")
        return
    if experts.count % ep:
        raise UserError(
            f"parallel.expert_model_parallel_size={ep} does not divide the model's {experts.count} experts; choose a divisor"
        )
    if experts.ffn_hidden_size % etp:
        raise UserError(
            f"parallel.expert_tensor_parallel_size={etp} does not divide the experts' feed-forward width of "
            f"{experts.ffn_hidden_size}; choose a divisor"
        )
    if parallel.stage_size % (ep * etp):
        raise UserError(
            f"parallel.expert_model_parallel_size={ep} x expert_tensor_parallel_size={etp} does not divide the "
            f"{parallel.stage_size} ranks of a pipeline stage (tensor x context x data); choose sizes whose product does"
        )
    if tp > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} with experts needs parallel.sequence_parallel=true: otherwise every rank "
            "would send the same tokens to the experts"
        )
