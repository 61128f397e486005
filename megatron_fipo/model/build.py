"""Builds the Megatron-Core model chunks of this rank from a Hugging Face config.

`load_hf_weights` loads the weights.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.config import ModelConfig, ParallelConfig, RouterConfig
from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.environment import can_compile
from megatron_fipo.families.family import Architecture, padded_vocab_size
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.model import mcore
from megatron_fipo.model.gpt import LogProbGPTModel
from megatron_fipo.model.layer_spec import TRANSFORMER_ENGINE, block_spec, choose_layer_spec
from megatron_fipo.model.megatron_precision import layer_precision
from megatron_fipo.model.routing import router_weights
from megatron_fipo.model.swiglu import SwiGLU


def build_model(
    folder: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    kernels: str = "auto",
) -> list[LanguageModule]:
    """This rank's model chunks: one, or `virtual_pipeline_model_parallel_size` of them, in pipeline order.

    Of `folder` only config.json is read. `kernels`, as `head.kernels`, is for the activation. Parameters have
    `model.dtype` and random values. Each chunk has the additional attributes `family`, `architecture` and
    `unpadded_vocab_size`. Requires `parallel.initialize`.
    With tied embeddings and several pipeline stages it is collective over the embedding group (one all-reduce
    of the embedding, by Megatron-Core). UserError for an unknown architecture, or one that the parallel sizes
    do not divide.
    """
    family, architecture = read_model_config(folder)
    check_divisibility(architecture, parallel)
    layer_spec = choose_layer_spec(model.layer_spec, model.dtype)
    config = transformer_config(architecture, model, parallel, layer_spec)
    virtual_stages = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual_stages) if virtual_stages else [None]:
        build = _hybrid_model if mcore.USES_HYBRID_MODEL else _gpt_model
        chunk = build(
            architecture,
            layer_spec,
            config=config,
            vocab_size=padded_vocab_size(architecture.vocab_size, parallel.tensor_model_parallel_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            rope_scaling_factor=architecture.rope_scaling_factor,
            vp_stage=vp_stage,
        )
        mcore.mark_experts(chunk)
        set_activation(chunk, kernels)
        for parameter in router_weights(chunk):
            parameter.requires_grad_(model.router.trainable)
        chunk.family, chunk.architecture = family, architecture
        chunk.unpadded_vocab_size = architecture.vocab_size
        chunks.append(chunk)
    return chunks


def _gpt_model(architecture: Architecture, layer_spec: str, **arguments: Any) -> LanguageModule:
    return LogProbGPTModel(
        transformer_layer_spec=block_spec(arguments["config"], layer_spec, arguments["vp_stage"]),
        rope_scaling=architecture.rope_scaling_factor != 1.0,
        **arguments,
    )


def _hybrid_model(architecture: Architecture, layer_spec: str, **arguments: Any) -> LanguageModule:
    from megatron_fipo.model.hybrid import (
        LogProbHybridModel,
        hybrid_arguments,
    )  # Megatron-Core 0.19 and later

    return LogProbHybridModel(**hybrid_arguments(arguments["config"], architecture, layer_spec), **arguments)


def set_activation(layers: MegatronModule, kernels: str = "auto") -> None:
    """Let `SwiGLU` compute the activation of layers that were built with `transformer_config`, if that says so."""
    if layers.config.use_te_activation_func:
        for module in (module for module in layers.modules() if isinstance(module, MLP)):
            module.activation_func = SwiGLU(kernels)


def transformer_config(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, layer_spec: str
) -> TransformerConfig:
    """Megatron-Core's config: architecture, parallel layout, and settings for packed per-token training."""
    on_cpu = not torch.cuda.is_available()
    return TransformerConfig(
        **_layer_counts(architecture, model.recompute),
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `load_hf_weights` overwrites the values, but initialization also marks the parameters that are
        # sharded over tensor-parallel ranks. Without the marks the gradient norm counts only rank 0's shards.
        perform_initialization=True,
        use_cpu_initialization=on_cpu,
        apply_rope_fusion=layer_spec == TRANSFORMER_ENGINE,
        # There is no bias and no dropout, so without fusion this is one addition.
        bias_dropout_fusion=False,
        **_activation_settings(architecture),
        gradient_accumulation_fusion=mcore.HAS_APEX_WEIGHT_GRADIENT and not on_cpu,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type="p2p",
        calculate_per_token_loss=True,
        **layer_precision(model),
        **_pipeline_settings(parallel, on_cpu),
        **_expert_settings(architecture, model.router, parallel, layer_spec),
        **mcore.NO_CUDA_GRAPHS,
    )


def _activation_settings(architecture: Architecture) -> dict[str, Any]:
    """Keywords of `TransformerConfig`: `SwiGLU` computes the activation (`set_activation`), but on GPUs not that of experts.

    The name of the first is that of the modules for which Megatron-Core made the place. The activation of experts is multiplied
    by the router's weights, which Megatron-Core fuses through torch.compile.
    """
    fused_by_compiler = architecture.experts is not None and can_compile()
    return {"use_te_activation_func": not fused_by_compiler, "bias_activation_fusion": fused_by_compiler}


def _pipeline_settings(parallel: ParallelConfig, on_cpu: bool) -> dict[str, Any]:
    """Keywords of `TransformerConfig` for pipeline parallelism.

    With packs of varying length, Megatron's interleaved schedule is correct only with overlapped, unbatched
    point-to-point sends. Deallocating sent outputs would corrupt them under gloo, which still reads the
    tensor while the send is in flight.
    """
    virtual_stages = parallel.virtual_pipeline_model_parallel_size
    return {
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "overlap_p2p_comm": virtual_stages is not None,
        "batch_p2p_comm": virtual_stages is None,
        "deallocate_pipeline_outputs": not on_cpu,
        "variable_seq_lengths": True,
        # Megatron-Core refuses other dispatchers with variable_seq_lengths, even in a model without experts.
        "moe_token_dispatcher_type": "alltoall",
    }


def _expert_settings(
    architecture: Architecture, router: RouterConfig, parallel: ParallelConfig, layer_spec: str
) -> dict[str, Any]:
    """Keywords of `TransformerConfig` for a mixture of experts: no token is dropped, and no capacity limits an expert."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # Megatron-Core has two softmaxes: over all experts before the choice, or over the chosen ones.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": {"float32": "fp32", "float64": "fp64"}[router.dtype],
        "moe_router_load_balancing_type": "aux_loss" if router.load_balancing else "none",
        "moe_aux_loss_coeff": router.load_balancing,
        "moe_grouped_gemm": layer_spec == TRANSFORMER_ENGINE,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def _layer_counts(architecture: Architecture, recompute: str) -> dict[str, Any]:
    """Keywords of `TransformerConfig` that count layers: their number, where experts are, and what is recomputed."""
    halves = mcore.HALVES if mcore.USES_HYBRID_MODEL else 1
    counts: dict[str, Any] = {
        "num_layers": halves * architecture.num_layers,
        "is_hybrid_model": mcore.USES_HYBRID_MODEL,
        "recompute_granularity": None if recompute == "none" else recompute,
    }
    if recompute == "full":
        counts |= {"recompute_method": "uniform", "recompute_num_layers": halves}
    experts = architecture.experts
    if experts is not None and experts.dense_layers and not mcore.USES_HYBRID_MODEL:  # its pattern says it
        counts["moe_layer_freq"] = [
            int(architecture.has_experts(layer)) for layer in range(architecture.num_layers)
        ]
    return counts
