"""The common part of the decoder families: table of weights and translation of the config.

A family adds its optional weights and names the variants that it does not support (see `qwen3.py`).
"""

from math import inf
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import (
    EMBEDDING_WEIGHT,
    OUTPUT_WEIGHT,
    Architecture,
    Experts,
    HfTensor,
    Layers,
    Layout,
    Rule,
    read_flag,
    read_number,
    read_size,
)

_LAYER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"

_EMBEDDING = Rule(
    EMBEDDING_WEIGHT, Layout.VOCABULARY, (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),)
)
_ATTENTION = (
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.input_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        Layout.QKV,
        (
            HfTensor(f"{_HF}.self_attn.q_proj.weight", ("query", "hidden")),
            HfTensor(f"{_HF}.self_attn.k_proj.weight", ("key", "hidden")),
            HfTensor(f"{_HF}.self_attn.v_proj.weight", ("key", "hidden")),
        ),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_proj.weight",
        Layout.ROW,
        (HfTensor(f"{_HF}.self_attn.o_proj.weight", ("hidden", "query")),),
    ),
)
_FEED_FORWARD = (
    Rule(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.post_attention_layernorm.weight", ("hidden",)),),
        Layers.DENSE,
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.weight",
        Layout.GATE_UP,
        (
            HfTensor(f"{_HF}.mlp.gate_proj.weight", ("ffn", "hidden")),
            HfTensor(f"{_HF}.mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        Layers.DENSE,
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc2.weight",
        Layout.ROW,
        (HfTensor(f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),),
        Layers.DENSE,
    ),
)
_FINAL_NORM = Rule(
    "decoder.final_layernorm.weight", Layout.REPLICATED, (HfTensor("model.norm.weight", ("hidden",)),)
)
_OUTPUT = Rule(OUTPUT_WEIGHT, Layout.VOCABULARY, (HfTensor("lm_head.weight", ("vocab", "hidden")),))

QKV_BIAS = (
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.bias",
        Layout.QKV,
        (
            HfTensor(f"{_HF}.self_attn.q_proj.bias", ("query",)),
            HfTensor(f"{_HF}.self_attn.k_proj.bias", ("key",)),
            HfTensor(f"{_HF}.self_attn.v_proj.bias", ("key",)),
        ),
    ),
)
QK_NORM = (
    Rule(
        f"{_LAYER}.self_attention.q_layernorm.weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.self_attn.q_norm.weight", ("head",)),),
    ),
    Rule(
        f"{_LAYER}.self_attention.k_layernorm.weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.self_attn.k_norm.weight", ("head",)),),
    ),
)


EXPERTS = (
    Rule(
        f"{_LAYER}.pre_mlp_layernorm.weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.post_attention_layernorm.weight", ("hidden",)),),
        Layers.EXPERTS,
    ),
    Rule(
        f"{_LAYER}.mlp.router.weight",
        Layout.REPLICATED,
        (HfTensor(f"{_HF}.mlp.gate.weight", ("experts", "hidden")),),
        Layers.EXPERTS,
    ),
    Rule(
        f"{_LAYER}.mlp.experts.local_experts.{{expert}}.linear_fc1.weight",
        Layout.GATE_UP,
        (
            HfTensor(f"{_HF}.mlp.experts.{{expert}}.gate_proj.weight", ("expert_ffn", "hidden")),
            HfTensor(f"{_HF}.mlp.experts.{{expert}}.up_proj.weight", ("expert_ffn", "hidden")),
        ),
        Layers.EXPERTS,
    ),
    Rule(
        f"{_LAYER}.mlp.experts.local_experts.{{expert}}.linear_fc2.weight",
        Layout.ROW,
        (HfTensor(f"{_HF}.mlp.experts.{{expert}}.down_proj.weight", ("hidden", "expert_ffn")),),
        Layers.EXPERTS,
    ),
)


def decoder_rules(*optional: Rule) -> tuple[Rule, ...]:
    """The table of a decoder, with the optional rules (`QKV_BIAS`, `QK_NORM`, `EXPERTS`) added to its layers."""
    return (_EMBEDDING, *_ATTENTION, *_FEED_FORWARD, *optional, _FINAL_NORM, _OUTPUT)


LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values of Llama 3's rotary scaling that are constants in Megatron-Core. Only the factor can be set
there."""


def decoder_architecture(
    config: dict[str, Any],
    add_qkv_bias: bool = False,
    qk_layernorm: bool = False,
    experts: Experts | None = None,
) -> Architecture:
    """`config.json` as an `Architecture`.

    UserError naming the key if it is missing or wrong, or an unsupported variant.

    The head size is `head_dim`, or hidden_size / num_attention_heads if the config has no `head_dim`.
    """
    try:
        heads, hidden_size = read_size(config, "num_attention_heads"), read_size(config, "hidden_size")
        groups = read_size(config, "num_key_value_heads")
        rotary_base, rope_scaling_factor = read_rotary(config)
        architecture = Architecture(
            num_layers=read_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=read_size(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=read_size(config, "head_dim")
            if config.get("head_dim") is not None
            else hidden_size // heads,
            vocab_size=read_size(config, "vocab_size"),
            max_position_embeddings=read_size(config, "max_position_embeddings"),
            layernorm_epsilon=read_number(config, "rms_norm_eps"),
            rotary_base=rotary_base,
            rope_scaling_factor=rope_scaling_factor,
            share_embeddings_and_output_weights=read_flag(config, "tie_word_embeddings"),
            add_qkv_bias=add_qkv_bias,
            qk_layernorm=qk_layernorm,
            initializer_range=read_number({"initializer_range": 0.02} | config, "initializer_range"),
            experts=experts,
        )
    except KeyError as missing:
        raise UserError(f"{missing} is missing; every model of this family needs it") from None
    if heads % groups:
        raise UserError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if config.get("head_dim") is None and hidden_size % heads:
        raise UserError(
            f"num_attention_heads={heads} does not divide hidden_size={hidden_size}, and there is no head_dim"
        )
    refuse_other_layers(config)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"hidden_act={config['hidden_act']!r} is not supported; models of this family need 'silu'"
        )
    return architecture


def read_rotary(config: dict[str, Any]) -> tuple[float, float]:
    """(rotary base, factor of Llama 3's scaling). The factor is 1.0 without scaling.

    Read from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier). UserError for
    any other scaling, for values of Llama 3's scaling that Megatron-Core does not support, and for rotations
    of a part of the channels.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"rope_parameters or rope_scaling has to be an object, not {parameters!r}")
    if nested := [key for key in parameters if key.endswith("_attention")]:
        raise UserError(
            f"rope_parameters for {', '.join(nested)} are not supported; state one for all layers"
        )
    base = read_number({"rope_theta": config.get("rope_theta", 10000.0)} | parameters, "rope_theta")
    for values in (config, parameters):
        if values.get("partial_rotary_factor") not in (None, 1):
            raise UserError(f"partial_rotary_factor={values['partial_rotary_factor']!r} is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, 1.0
    if kind != "llama3":
        raise UserError(
            f"rotary scaling {kind!r} (rope_parameters or rope_scaling) is not supported; supported are "
            "'default' and 'llama3'"
        )
    for key, value in LLAMA3_SCALING.items():
        if parameters.get(key) != value:
            raise UserError(
                f"rotary scaling 'llama3' with {key}={parameters.get(key)} is not supported; "
                f"Megatron-Core has {value}"
            )
    factor = parameters.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < inf:
        raise UserError(f"rotary scaling 'llama3' needs a factor of at least 1, not {factor!r}")
    return base, float(factor)


def refuse_other_layers(config: dict[str, Any]) -> None:
    """UserError if `layer_types` has anything but full attention for each layer."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise UserError(
            f"layer_types={kinds!r} is not supported; models need {layers} times 'full_attention'"
        )


def refuse_true(config: dict[str, Any], *keys: str) -> None:
    """UserError naming the first of `keys` that the config sets to true."""
    for key in keys:
        if config.get(key):
            raise UserError(
                f"{key}=true is not supported; models of this family are supported with {key}=false only"
            )
