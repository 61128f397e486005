"""What the dense decoder families have in common: the table of their weights and the translation of their config.

A family adds to it the weights that not all of them have, and says which variants it does not cover (see `qwen3.py`).
"""

from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.families.family import (
    EMBEDDING_WEIGHT,
    OUTPUT_WEIGHT,
    Architecture,
    Layout,
    Part,
    Rule,
    read_size,
)

_LAYER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"

_EMBEDDING = Rule(
    EMBEDDING_WEIGHT, Layout.VOCABULARY, (Part("model.embed_tokens.weight", ("vocab", "hidden")),)
)
_EVERY_LAYER = (
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        Layout.REPLICATED,
        (Part(f"{_HF}.input_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        Layout.QKV,
        (
            Part(f"{_HF}.self_attn.q_proj.weight", ("query", "hidden")),
            Part(f"{_HF}.self_attn.k_proj.weight", ("key", "hidden")),
            Part(f"{_HF}.self_attn.v_proj.weight", ("key", "hidden")),
        ),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_proj.weight",
        Layout.ROW,
        (Part(f"{_HF}.self_attn.o_proj.weight", ("hidden", "query")),),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        Layout.REPLICATED,
        (Part(f"{_HF}.post_attention_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.weight",
        Layout.GATE_UP,
        (
            Part(f"{_HF}.mlp.gate_proj.weight", ("ffn", "hidden")),
            Part(f"{_HF}.mlp.up_proj.weight", ("ffn", "hidden")),
        ),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc2.weight",
        Layout.ROW,
        (Part(f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),),
    ),
)
_FINAL_NORM = Rule(
    "decoder.final_layernorm.weight", Layout.REPLICATED, (Part("model.norm.weight", ("hidden",)),)
)
_OUTPUT = Rule(OUTPUT_WEIGHT, Layout.VOCABULARY, (Part("lm_head.weight", ("vocab", "hidden")),))

QKV_BIAS = (
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.bias",
        Layout.QKV,
        (
            Part(f"{_HF}.self_attn.q_proj.bias", ("query",)),
            Part(f"{_HF}.self_attn.k_proj.bias", ("key",)),
            Part(f"{_HF}.self_attn.v_proj.bias", ("key",)),
        ),
    ),
)
QK_NORM = (
    Rule(
        f"{_LAYER}.self_attention.q_layernorm.weight",
        Layout.REPLICATED,
        (Part(f"{_HF}.self_attn.q_norm.weight", ("head",)),),
    ),
    Rule(
        f"{_LAYER}.self_attention.k_layernorm.weight",
        Layout.REPLICATED,
        (Part(f"{_HF}.self_attn.k_norm.weight", ("head",)),),
    ),
)


def dense_rules(*optional: Rule) -> tuple[Rule, ...]:
    """The table of a dense decoder, with the given rules added to every layer (`QKV_BIAS`, `QK_NORM`)."""
    return (_EMBEDDING, *_EVERY_LAYER, *optional, _FINAL_NORM, _OUTPUT)


LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers of Llama 3's rotary scaling that Megatron-Core has as constants; only the factor can be set there."""


def dense_architecture(
    config: dict[str, Any], add_qkv_bias: bool = False, qk_layernorm: bool = False
) -> Architecture:
    """`config.json` as an `Architecture`. UserError naming the key for a missing or wrong one, or a variant not covered here.

    The heads' size is `head_dim`, or hidden_size / num_attention_heads where the config has none.
    """
    try:
        heads, hidden_size = read_size(config, "num_attention_heads"), read_size(config, "hidden_size")
        rotary_base, rope_scaling_factor = read_rotary(config)
        architecture = Architecture(
            num_layers=read_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=read_size(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=read_size(config, "num_key_value_heads"),
            kv_channels=read_size(config, "head_dim")
            if config.get("head_dim") is not None
            else hidden_size // heads,
            vocab_size=read_size(config, "vocab_size"),
            max_position_embeddings=read_size(config, "max_position_embeddings"),
            layernorm_epsilon=config["rms_norm_eps"],
            rotary_base=rotary_base,
            rope_scaling_factor=rope_scaling_factor,
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            add_qkv_bias=add_qkv_bias,
            qk_layernorm=qk_layernorm,
            initializer_range=config.get("initializer_range", 0.02),
        )
    except KeyError as missing:
        raise UserError(f"{missing} is missing; every model of this family needs it") from None
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"hidden_act={config['hidden_act']!r} is not supported; models of this family have 'silu'"
        )
    return architecture


def read_rotary(config: dict[str, Any]) -> tuple[float, float]:
    """(rotary base, factor of Llama 3's scaling), the factor 1.0 for plain positions.

    From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before). UserError for any other scaling, and for
    figures of Llama 3's that Megatron-Core cannot express.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    base = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return base, 1.0
    if kind != "llama3":
        raise UserError(
            f"rotary scaling {kind!r} (rope_parameters or rope_scaling) is not supported; 'default' and 'llama3' are"
        )
    for key, value in LLAMA3_SCALING.items():
        if parameters.get(key) != value:
            raise UserError(
                f"rotary scaling 'llama3' with {key}={parameters.get(key)} is not supported; Megatron-Core has {value}"
            )
    factor = parameters.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
        raise UserError(f"rotary scaling 'llama3' needs a factor of at least 1, not {factor!r}")
    return base, float(factor)


def refuse_true(config: dict[str, Any], *keys: str) -> None:
    """UserError naming the first of `keys` that the config sets to true."""
    for key in keys:
        if config.get(key):
            raise UserError(
                f"{key}=true is not supported; models of this family are covered with {key}=false only"
            )
