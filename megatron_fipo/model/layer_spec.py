"""The modules of a transformer layer: portable ones (plain torch) or Transformer Engine's.

Parameters have the same names in distributed checkpoints for both, so each reads the other's checkpoints.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_fipo.config.gpu_rules import INSTALL, check_layers
from megatron_fipo.errors import UserError
from megatron_fipo.model import mcore
from megatron_fipo.model.attention import PackedAttention

PORTABLE = "portable"
TRANSFORMER_ENGINE = "transformer_engine"


def shared_names(has_experts: bool) -> dict[str, str]:
    """The prefixes of a portable layer's norms, and their names in checkpoints and family tables.

    Portable norms are separate modules. Transformer Engine's are fused into the linear layer that follows, and give the
    names, except before a mixture of experts: there its norm is separate too.
    """
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return names if has_experts else {**names, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def choose_layer_spec(wanted: str, dtype: str) -> str:
    """`portable` or `transformer_engine` for a setting that may also be `auto`.

    `trainer/active.py` reports it at the start.

    `auto` chooses Transformer Engine for bfloat16 if it is installed and CUDA is available. UserError if
    Transformer Engine is requested but unavailable, or requested for another dtype.
    """
    check_layers(wanted, dtype)
    usable = mcore.has_transformer_engine() and torch.cuda.is_available()
    if wanted == "auto":
        return TRANSFORMER_ENGINE if usable and dtype == "bfloat16" else PORTABLE
    if wanted == TRANSFORMER_ENGINE and not usable:
        raise UserError(
            f"model.layer_spec=transformer_engine needs a GPU and the transformer-engine package ({INSTALL})"
        )
    return wanted


def block_spec(
    config: TransformerConfig, layer_spec: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage), and the norm after the last layer."""
    if layer_spec == TRANSFORMER_ENGINE:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage)
    pattern = config.moe_layer_freq
    layers = [
        portable_layer_spec(
            config, bool(pattern[layer] if isinstance(pattern, list) else config.num_moe_experts)
        )
        for layer in range(first, first + get_num_layers_to_build(config, vp_stage))
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def portable_layer_spec(config: TransformerConfig, has_experts: bool = False) -> ModuleSpec:
    """A pre-norm layer of Megatron-Core's parallel linear layers, with this package's norm and attention.

    Experts are computed one after the other.
    """
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    feed_forward = mcore.feed_forward_spec(ColumnParallelLinear, RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
            if has_experts
            else feed_forward,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=shared_names(has_experts),
        ),
    )


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, [..., hidden_size] -> same shape, computed in float32.

    With sequence parallelism each tensor-parallel rank normalizes its own tokens, so the weight's gradient is
    a sum over ranks. The `sequence_parallel` attribute makes Megatron compute this sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
