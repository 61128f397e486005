"""Configs become the right architecture, or one sentence that names the problem."""

import json

import pytest
import torch

from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.errors import UserError
from megatron_fipo.families.llama import LLAMA
from megatron_fipo.families.qwen2 import QWEN2
from megatron_fipo.families.qwen3 import QWEN3
from megatron_fipo.families.registry import find_family, read_hf_config
from megatron_fipo.model import mcore
from megatron_fipo.model.layer_spec import choose_layer_spec

QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_a_public_config_gives_the_public_number_of_parameters():
    architecture = find_family(QWEN25_7B).translate(QWEN25_7B)
    assert architecture.rotary_base == 1e6
    assert architecture.kv_channels == 128
    total = 0
    for weight in QWEN2.weights(architecture):
        for shape in weight.shapes:
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert total == 7_615_616_512


def test_tied_embeddings_leave_out_the_output_layer():
    names = [
        name
        for weight in QWEN2.weights(QWEN2.translate(QWEN25_7B | {"tie_word_embeddings": True}))
        for name in weight.names
    ]
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 28 * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "'linear'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_variants_that_are_not_covered_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        QWEN2.translate(QWEN25_7B | change)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama_scaling_is_read_from_old_and_new_configs(key):
    architecture = LLAMA.translate(QWEN25_7B | {key: LLAMA3_ROPE | {"factor": 32.0}})
    assert (architecture.rotary_base, architecture.rope_scaling_factor) == (1e6, 32.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"low_freq_factor": 2.0},
            r"'llama3' with low_freq_factor=2.0 is not supported; Megatron-Core has 1.0",
        ),
        ({"high_freq_factor": 8.0}, r"with high_freq_factor=8.0 is not supported; Megatron-Core has 4.0"),
        (
            {"original_max_position_embeddings": 4096},
            r"original_max_position_embeddings=4096 is not supported; .* 8192",
        ),
        ({"factor": None}, "needs a factor of at least 1, not None"),
        ({"factor": 0.5}, "needs a factor of at least 1, not 0.5"),
        ({"rope_type": "dynamic"}, "'dynamic'"),
    ],
)
def test_llama_scaling_that_megatron_cannot_express_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        LLAMA.translate(QWEN25_7B | {"rope_scaling": LLAMA3_ROPE | change})


def test_missing_lengths_are_refused_rather_than_guessed():
    without = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    with pytest.raises(UserError, match="original_max_position_embeddings=None"):
        LLAMA.translate(QWEN25_7B | {"rope_scaling": without})


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (LLAMA, "attention_bias"),
        (LLAMA, "mlp_bias"),
        (QWEN3, "attention_bias"),
        (QWEN3, "use_sliding_window"),
    ],
)
def test_variants_of_other_families_are_refused(family, key):
    family.translate(QWEN25_7B | {key: False})
    with pytest.raises(UserError, match=f"{key}=true is not supported"):
        family.translate(QWEN25_7B | {key: True})


def test_qwen3_heads_have_the_size_that_transformers_takes_without_one():
    assert QWEN3.translate(QWEN25_7B | {"num_attention_heads": 56}).kv_channels == 128
    assert QWEN3.translate(QWEN25_7B | {"head_dim": 64}).kv_channels == 64


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="'num_hidden_layers'"):
        QWEN2.translate({key: value for key, value in QWEN25_7B.items() if key != "num_hidden_layers"})


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(UserError, match=r"MambaForCausalLM is not supported; known: .*Qwen2ForCausalLM"):
        find_family({"architectures": ["MambaForCausalLM"]})


def test_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="JSON object"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor_model_parallel_size": 8},
            "tensor_model_parallel_size=8 does not divide the model's 28 attention heads",
        ),
        ({"tensor_model_parallel_size": 7}, "7 does not divide the model's 4 key-value heads"),
        (
            {"pipeline_model_parallel_size": 3},
            "pipeline_model_parallel_size=3 does not divide the model's 28 layers",
        ),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            "=4 times parallel.virtual_pipeline_model_parallel_size=2 does not divide the model's 28 layers",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs parallel.pipeline_model_parallel_size > 1"),
    ],
)
def test_splits_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        check_divisibility(QWEN2.translate(QWEN25_7B), ParallelConfig(**sizes))


def test_transformer_engine_is_not_promised_where_it_is_not():
    assert choose_layer_spec("auto", "bfloat16") == "portable"
    with pytest.raises(UserError, match="transformer_engine needs a GPU"):
        choose_layer_spec("transformer_engine", "bfloat16")


def test_float32_is_not_for_transformer_engine(monkeypatch):
    monkeypatch.setattr(mcore, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_layer_spec("auto", "bfloat16") == "transformer_engine"
    assert choose_layer_spec("auto", "float32") == "portable"
    with pytest.raises(UserError, match="needs dtype=bfloat16, not float32"):
        choose_layer_spec("transformer_engine", "float32")
