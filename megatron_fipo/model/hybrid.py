"""Megatron-Core's HybridModel as a decoder with the weights, names and checkpoints of GPTModel.

From 0.19 on Megatron-Core calls GPTModel deprecated and HybridModel its successor (docs/megatron-core-versions.md).
`mcore.USES_HYBRID_MODEL` chooses between the two. HybridModel's layers are half as large:

    a layer of the family   TransformerBlock of GPTModel   HybridStack of HybridModel      symbol in the pattern
    7, attention            decoder.layers.7               decoder.layers.14               *
    7, feed-forward part    decoder.layers.7               decoder.layers.15               - (dense) or E (experts)

A distributed checkpoint and a family's table have GPTModel's names, for both models.
"""

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_fipo.families.family import Architecture
from megatron_fipo.model.gpt import apply_head
from megatron_fipo.model.layer_spec import TRANSFORMER_ENGINE, RMSNorm, portable_layer_spec
from megatron_fipo.model.logprob_head.head import HeadRequest
from megatron_fipo.model.mcore import HALVES, layer_of


class LogProbHybridModel(HybridModel):
    """HybridModel with a last stage that returns log-probs of the response: `labels` is a `HeadRequest`.

    `rope_scaling_factor` is that of Llama 3's scaling, which HybridModel has no argument for.
    """

    post_process: bool

    def __init__(
        self, config: TransformerConfig, rotary_base: float, rope_scaling_factor: float, **arguments: Any
    ):
        super().__init__(config=config, rotary_base=rotary_base, **arguments)
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling_factor != 1.0,
            rope_scaling_factor=rope_scaling_factor,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )

    def forward(self, *arguments: Any, labels: Any = None, **keywords: Any) -> Any:
        """[2, R] for a `HeadRequest` on the last stage, see `apply_head`. HybridModel's output otherwise."""
        if not (isinstance(labels, HeadRequest) and self.post_process):
            return super().forward(*arguments, labels=labels, **keywords)
        # Without it `forward` ends after the final norm. Not so for good: the attribute also tells the last stage that it
        # has a copy of a tied embedding, for gradients and checkpoints.
        self.post_process = False
        try:
            hidden_states = super().forward(*arguments, **keywords)
        finally:
            self.post_process = True
        return apply_head(self, hidden_states, labels)


class DecoderStack(HybridStack):
    """HybridStack with a final norm of choice, under GPTModel's name, and with GPTModel's names in checkpoints.

    Its own final norm is Transformer Engine's. `stacked`: whether all layers have the same weights, so that a
    checkpoint has one tensor for those of all layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        final_layernorm: Any,
        stacked: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **arguments)
        self.stacked = stacked
        if self.post_process:
            self.final_layernorm = final_layernorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden_states = super().forward(*arguments, **keywords)
        return self.final_layernorm(hidden_states) if self.post_process else hidden_states

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """That of GPTModel's TransformerBlock with the same weights, except for the keys of the dictionary."""
        state: ShardedStateDict = {}
        for index, half in enumerate(self.layers):
            layer, here = layer_of(half), f"{prefix}layers.{index}."
            offsets = [(0, layer, self.config.num_layers // HALVES)] if self.stacked else []
            tensors = half.sharded_state_dict(here, offsets, metadata)
            there = f"{prefix}layers." if self.stacked else f"{prefix}layers.{layer}."
            replace_prefix_for_sharding(tensors, here, there)
            state.update(tensors)
        for name, module in self.named_children():
            if module is not self.layers:
                state.update(
                    sharded_state_dict_default(
                        module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                    )
                )
        return state


def hybrid_arguments(
    config: TransformerConfig, architecture: Architecture, layer_spec: str
) -> dict[str, Any]:
    """The arguments of `LogProbHybridModel` for its layers."""
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    dense = _layer_spec(config, layer_spec, has_experts=False)
    experts = _layer_spec(config, layer_spec, has_experts=architecture.experts is not None)
    return {
        "hybrid_layer_pattern": layer_pattern(architecture, stages),
        "hybrid_stack_spec": ModuleSpec(
            module=DecoderStack,
            params={
                "final_layernorm": _final_norm(layer_spec),
                "stacked": not (architecture.experts and architecture.experts.dense_layers),
            },
            submodules=HybridStackSubmodules(
                attention_layer=_attention_half(dense),
                mlp_layer=_feed_forward_half(dense),
                moe_layer=_feed_forward_half(experts),
            ),
        ),
    }


def layer_pattern(architecture: Architecture, stages: int) -> str:
    """HybridModel's text for the layers of each pipeline stage (virtual ones counted), such as `*-*E|*E*E`."""
    halves = [
        Symbols.ATTENTION + (Symbols.MOE if architecture.has_experts(layer) else Symbols.MLP)
        for layer in range(architecture.num_layers)
    ]
    of_stage = architecture.num_layers // stages
    return Symbols.PIPE.join(
        "".join(halves[first : first + of_stage]) for first in range(0, architecture.num_layers, of_stage)
    )


def _layer_spec(config: TransformerConfig, layer_spec: str, has_experts: bool) -> ModuleSpec:
    if layer_spec != TRANSFORMER_ENGINE:
        return portable_layer_spec(config, has_experts)
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        use_te_activation_func=config.use_te_activation_func,
    )


def _final_norm(layer_spec: str) -> Any:
    if layer_spec != TRANSFORMER_ENGINE:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _attention_half(spec: ModuleSpec) -> ModuleSpec:
    rest = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    return replace(spec, submodules=replace(spec.submodules, **rest))


def _feed_forward_half(spec: ModuleSpec) -> ModuleSpec:
    rest = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    return replace(spec, submodules=replace(spec.submodules, **rest))
