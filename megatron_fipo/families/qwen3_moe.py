"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with a mixture of experts in the place of the feed-forward part."""

from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.families.decoder import (
    EXPERTS,
    QK_NORM,
    decoder_architecture,
    decoder_rules,
    refuse_true,
)
from megatron_fipo.families.family import Architecture, Experts, Family, read_flag, read_size

MOST_EXPERTS = 4096
_OTHER_ROUTERS = ("n_group", "topk_group", "num_expert_group", "routed_scaling_factor", "use_expert_bias")
_SHARED_EXPERTS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")


def translate(config: dict[str, Any]) -> Architecture:
    """As `decoder_architecture`, with transformers' defaults of this family.

    UserError also for sliding windows, biases, shared experts, and routers other than a top-k softmax.
    """
    refuse_true(config, "use_sliding_window", "attention_bias")
    return decoder_architecture(config, qk_layernorm=True, experts=_read_experts(config))


def _read_experts(config: dict[str, Any]) -> Experts | None:
    """None if every layer is dense."""
    for key in _SHARED_EXPERTS:
        if config.get(key):
            raise UserError(
                f"{key}={config[key]!r} is not supported; models of this family have no shared experts"
            )
    for key in _OTHER_ROUTERS:
        if config.get(key):
            raise UserError(
                f"{key}={config[key]!r} is not supported; the router has to be a softmax over all experts"
            )
    if config.get("scoring_func", "softmax") != "softmax":
        raise UserError(
            f"scoring_func={config['scoring_func']!r} is not supported; the router has to be a softmax"
        )
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    if config.get("num_local_experts", config.get(key)) != config.get(key):
        raise UserError(
            f"num_experts={config['num_experts']!r} and num_local_experts={config['num_local_experts']!r} differ; "
            "remove the wrong one"
        )
    try:
        layers, count = read_size(config, "num_hidden_layers"), read_size(config, key)
        experts = Experts(
            count=count,
            per_token=read_size(config, "num_experts_per_tok"),
            ffn_hidden_size=read_size(config, "moe_intermediate_size"),
            normalized=read_flag(config, "norm_topk_prob"),
            dense_layers=_dense_layers(config, layers),
        )
    except KeyError as missing:
        raise UserError(f"{missing} is missing; every model of this family needs it") from None
    if count > MOST_EXPERTS:
        raise UserError(f"{key}={count} is more than the {MOST_EXPERTS} that are supported")
    if experts.per_token > count:
        raise UserError(f"num_experts_per_tok={experts.per_token} is more than num_experts={count}")
    if experts.per_token == 1 and experts.normalized:
        raise UserError(
            "num_experts_per_tok=1 with norm_topk_prob=true is not supported: the router's weight would always be 1"
        )
    return None if len(experts.dense_layers) == layers else experts


def _dense_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Layers without experts: those of `mlp_only_layers`, and all but each `decoder_sparse_step`-th.

    Example: 6 layers with step 2 and mlp_only_layers [1] have experts in layers 3 and 5.
    """
    step = read_size({"decoder_sparse_step": 1} | config, "decoder_sparse_step")
    listed = [] if config.get("mlp_only_layers") is None else config["mlp_only_layers"]
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise UserError(f"mlp_only_layers has to be a list of layer numbers, not {listed!r}")
    if outside := [layer for layer in listed if not 0 <= layer < layers]:
        raise UserError(
            f"mlp_only_layers names layer {outside[0]}, but there are {layers} layers, counted from 0"
        )
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


QWEN3_MOE = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), translate, decoder_rules(*QK_NORM, *EXPERTS))
