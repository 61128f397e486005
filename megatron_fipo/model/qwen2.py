"""Qwen2 and Qwen2.5 (dense): biases on query, key and value, RMSNorm, SwiGLU, rotary positions."""

from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.model.family import EMBEDDING_WEIGHT, OUTPUT_WEIGHT, Architecture, Family, Layout, Part, Rule, read_size

_LAYER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"


def translate(config: dict[str, Any]) -> Architecture:
    """`config.json` as an `Architecture`. UserError naming the key for a missing or wrong one, or a variant not covered here."""
    try:
        heads, hidden_size = read_size(config, "num_attention_heads"), read_size(config, "hidden_size")
        architecture = Architecture(
            num_layers=read_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=read_size(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=read_size(config, "num_key_value_heads"),
            kv_channels=read_size(config, "head_dim") if config.get("head_dim") is not None else hidden_size // heads,
            vocab_size=read_size(config, "vocab_size"),
            max_position_embeddings=read_size(config, "max_position_embeddings"),
            layernorm_epsilon=config["rms_norm_eps"],
            rotary_base=rotary_base(config),
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            add_qkv_bias=True,
            initializer_range=config.get("initializer_range", 0.02),
        )
    except KeyError as missing:
        raise UserError(f"a Qwen2 model needs {missing}, which is missing") from None
    if config.get("use_sliding_window"):
        raise UserError("use_sliding_window=true is not supported; set it to false for full attention")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={config['hidden_act']!r} is not supported; a Qwen2 model has 'silu'")
    return architecture


def rotary_base(config: dict[str, Any]) -> float:
    """The rotary base, from `rope_parameters` (transformers 5) or `rope_theta` (before). UserError where positions are scaled."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UserError(f"rotary scaling {kind!r} (rope_parameters or rope_scaling) is not supported for this family; remove it")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    translate=translate,
    rules=(
        Rule(EMBEDDING_WEIGHT, Layout.VOCABULARY, (Part("model.embed_tokens.weight", ("vocab", "hidden")),)),
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
            f"{_LAYER}.self_attention.linear_qkv.bias",
            Layout.QKV,
            (
                Part(f"{_HF}.self_attn.q_proj.bias", ("query",)),
                Part(f"{_HF}.self_attn.k_proj.bias", ("key",)),
                Part(f"{_HF}.self_attn.v_proj.bias", ("key",)),
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
        Rule(f"{_LAYER}.mlp.linear_fc2.weight", Layout.ROW, (Part(f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),)),
        Rule("decoder.final_layernorm.weight", Layout.REPLICATED, (Part("model.norm.weight", ("hidden",)),)),
        Rule(OUTPUT_WEIGHT, Layout.VOCABULARY, (Part("lm_head.weight", ("vocab", "hidden")),)),
    ),
)
