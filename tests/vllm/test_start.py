"""The start of the engine on the real vLLM: what is refused, and an engine with arguments of vLLM."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.protocol import GenerationRequest
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.errors import UserError
from tests.generations import ids
from tests.vllm.model import MAX_MODEL_LEN, PLAIN, largest_difference, save_model, some_requests, weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_path": "/nowhere"}, "no model folder /nowhere"),
        ({"tensor_parallel_size": 3}, "engine_tensor_parallel_size=3 does not divide the 4 attention heads"),
        (
            {"arguments": {"block_size": "big"}},
            r"vLLM refuses model.path .*, rollout.vllm.block_size=big .*: .*valid integer",
        ),
        (
            {"arguments": {"quantization": "nothing"}},
            r"rollout.vllm.quantization=nothing .*: .*nothing",
        ),
        ({"max_model_len": 257}, r"max_prompt_length \+ rollout.max_response_length.*256"),
    ],
)
def test_refusals_at_start(model_folder, run, change, message):
    arguments = {"model_path": str(model_folder), "dtype": "float32", "max_model_len": 64} | change
    with pytest.raises(UserError, match=message):
        run(VLLMEngine(**arguments).ready())


def test_an_unknown_architecture(tmp_path, run):
    folder = save_model(tmp_path, seed=0)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"quux"'))
    with pytest.raises(UserError, match="model_type='quux'"):
        run(VLLMEngine(str(folder), "float32", max_model_len=64).ready())


def spoiled(folder: Path) -> None:
    tensors = weights(folder)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_head(folder: Path) -> None:
    tensors = weights(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (spoiled, "model.norm.weight in .* has NaN or infinite values in float32"),
        (other_head, "lm_head.weight differs from model.embed_tokens.weight"),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors"),
            "or also consolidated.safetensors",
        ),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "old.safetensors"),
            "or also old.safetensors",
        ),
        (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), "has hf_quant_config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_a_folder_is_refused_before_vllm_starts(tmp_path, run, monkeypatch, edit, message):
    folder = save_model(tmp_path, seed=0)
    edit(folder)
    monkeypatch.setattr(
        "vllm.AsyncLLMEngine.from_vllm_config", lambda *args, **kwargs: pytest.fail("started")
    )
    with pytest.raises(UserError, match=message):
        run(VLLMEngine(str(folder), "float32", max_model_len=64).ready())


def test_an_engine_for_one_temperature_with_arguments_of_vllm_and_seeds(model_folder, run):
    engine = VLLMEngine(
        str(model_folder),
        "float32",
        max_model_len=MAX_MODEL_LEN,
        temperature=0.7,
        deterministic=True,
        arguments={"max_num_seqs": 3, "max_num_batched_tokens": 600, "block_size": 32},
    )
    run(engine.ready())
    try:
        config = engine._llm.vllm_config
        assert config.scheduler_config.max_num_seqs == 3
        assert config.scheduler_config.max_num_batched_tokens == 600
        assert config.cache_config.block_size == 32
        check_other_temperatures(engine, model_folder, run)
        check_seeds(engine, run)
    finally:
        engine._llm.shutdown()


def check_other_temperatures(engine: VLLMEngine, folder: Path, run: Callable) -> None:
    """Log-probs after temperature and before truncation, by `NormalizedLogits`."""
    requests = some_requests(4)
    for change in ({}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"temperature": 1.0, "min_p": 0.3}):
        sampling = replace(PLAIN, **({"temperature": 0.7} | change))
        generations = run(engine.generate(requests, sampling))
        assert largest_difference(folder, requests, generations, sampling.temperature) < 1e-4
    prompt = requests[0].prompt_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    probs = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 0.7, -1).detach()
    many = [GenerationRequest(f"{index}", prompt, index) for index in range(60)]
    sampling = replace(PLAIN, temperature=0.7, min_p=0.3, max_new_tokens=1)
    drawn = {ids(generation)[0] for generation in run(engine.generate(many, sampling))}
    assert drawn <= set((probs >= 0.3 * probs.max()).nonzero().flatten().tolist())


def check_seeds(engine: VLLMEngine, run: Callable) -> None:
    """A response depends on its own seed only."""
    requests = some_requests(4)
    together = run(engine.generate(requests, PLAIN))
    assert [ids(g) for g in run(engine.generate(requests, PLAIN))] == [ids(g) for g in together]
    alone = [ids(run(engine.generate([request], PLAIN))[0]) for request in requests]
    assert alone == [ids(g) for g in together]
    others = run(engine.generate([replace(request, seed=request.seed + 50) for request in requests], PLAIN))
    assert all(ids(other) != ids(generation) for other, generation in zip(others, together, strict=True))
