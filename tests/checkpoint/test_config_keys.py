"""Keys of config.json that transformers or vLLM obey and Megatron-Core does not."""

from pathlib import Path

import pytest

from megatron_fipo.checkpoint.model_folder import read_description
from megatron_fipo.errors import UserError
from tests.checkpoint.editing import save_model, set_config


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / "model")


def describe(folder: Path, family: str, **keys) -> None:
    """The check of config.json alone, for a family of the same sizes."""
    architectures = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "llama": "LlamaForCausalLM",
    }
    if family == "qwen3_moe":
        keys = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **keys}
    set_config(model_type=family, architectures=[architectures[family]], **keys)(folder)
    read_description(folder)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("value", [False, None, 0, "", []])
def test_a_model_that_attends_to_later_tokens_is_refused(folder, family, value):
    """null is not true either, for transformers and vLLM."""
    with pytest.raises(UserError, match=r"config.json has is_causal.*: transformers and vLLM then attend"):
        describe(folder, family, is_causal=value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 8}),
        ("qwen3", "dual_chunk_attention_config", {"chunk_size": 8}),
        ("qwen3_moe", "dual_chunk_attention_config", {"chunk_size": 8}),
        ("qwen2", "qk_norm", True),
        ("llama", "logit_scale", 0.5),
        ("llama", "logit_scale", None),
        ("llama", "qkv_bias", True),
        ("llama", "bias", True),
        ("llama", "target_layer_count", 2),
        ("llama", "sliding_window", 128),
    ],
)
def test_a_key_that_changes_the_model_of_vllm_alone_is_refused(folder, family, key, value):
    with pytest.raises(UserError, match=f"config.json has {key}.*: it changes the model of vLLM alone"):
        describe(folder, family, **{key: value})


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2", {"is_causal": True, "qk_norm": False, "dual_chunk_attention_config": None}),
        ("qwen2", {"sliding_window": 4096, "logit_scale": 0.5, "bias": True}),
        ("qwen3", {"is_causal": True, "qk_norm": True, "sliding_window": 4096}),
        ("qwen3_moe", {"is_causal": True, "qk_norm": True, "sliding_window": 4096, "logit_scale": 0.5}),
        ("llama", {"logit_scale": 1.0, "qkv_bias": False, "bias": None, "target_layer_count": 0}),
        ("llama", {"sliding_window": None, "qk_norm": True, "dual_chunk_attention_config": {}}),
    ],
)
def test_a_key_that_changes_nothing_is_accepted(folder, family, keys):
    describe(folder, family, **keys)
