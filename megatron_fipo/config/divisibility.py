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
    need a pipeline.
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
