"""A model with experts on the real vLLM: weight updates by expert, into tensors that vLLM fuses and packs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import tensor_checksum
from tests.generations import ids, plain
from tests.tiny_qwen3_moe import EXPERTS, save_qwen3_moe
from tests.vllm.model import MAX_MODEL_LEN, PLAIN, largest_difference, some_requests, weights

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=24)
SIZES = {"hidden_size": 128, "moe_intermediate_size": 72}
"""vLLM pads experts of 72 channels to 96."""
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_moe(tmp_path_factory.mktemp("first"), 0, **SIZES)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_qwen3_moe(tmp_path_factory.mktemp("second"), 1, **SIZES)


@pytest.fixture(scope="module")
def engines(first, second, run) -> Iterator[tuple[VLLMEngine, VLLMEngine]]:
    """One that receives weights, and one that has read those of `second` by itself.

    They start one after the other: transformers turns initialization off for the process, not for the thread that builds a model.
    """
    pair = tuple(
        VLLMEngine(str(folder), "float32", max_model_len=MAX_MODEL_LEN, deterministic=True)
        for folder in (first, second)
    )
    for engine in pair:
        run(engine.ready())
    yield pair  # type: ignore[misc]
    for engine in pair:
        engine._llm.shutdown()


async def push(engine: VLLMEngine, tensors: dict[str, torch.Tensor], version: int) -> dict[str, str]:
    """In three buckets, each with some projections of every expert."""
    await engine.begin_weight_update(check=True)
    for start in range(3):
        await engine.load_weights(dict(list(tensors.items())[start::3]))
    return await engine.finish_weight_update(version)


def local_tokens(folder: Path, requests: list[GenerationRequest]) -> list[tuple[int, ...]]:
    engine = LocalEngine(str(folder), "float32")
    engine.ready()
    return [ids(generation) for generation in engine.generate(requests, GREEDY)]


def test_pushed_experts_are_those_that_vllm_reads_itself(engines, first, second, run):
    """The same bits as an engine that was started on these weights, so also packed and padded in the same way."""
    engine, fresh = engines
    requests = some_requests()
    assert [ids(g) for g in run(engine.generate(requests, GREEDY))] == local_tokens(first, requests)
    before = plain(run(engine.generate(requests, PLAIN)))
    for version in (1, 2):
        tensors = weights(second)
        assert run(push(engine, tensors, version)) == {
            name: tensor_checksum(name, tensor) for name, tensor in tensors.items()
        }
        assert [ids(g) for g in run(engine.generate(requests, GREEDY))] == local_tokens(second, requests)
        sampled = run(engine.generate(requests, PLAIN))
        assert largest_difference(second, requests, sampled, 1.0) < 1e-4
        read = run(fresh.generate(requests, PLAIN))
        assert [(ids(g), g.log_probs.tobytes()) for g in sampled] == [
            (ids(g), g.log_probs.tobytes()) for g in read
        ]
        run(push(engine, weights(first), 0))
        assert plain(run(engine.generate(requests, PLAIN))) == before


def test_a_missing_expert_is_named(engines, first, run):
    engine, _ = engines
    tensors = weights(first)
    for bucket, message in (
        ({name: tensor for name, tensor in tensors.items() if name != EXPERT}, rf"lacks 1 of .* {EXPERT}"),
        ({EXPERT.replace(".5.", f".{EXPERTS}."): tensors[EXPERT]}, rf"no weight .*\.experts\.{EXPERTS}\."),
        (
            {EXPERT: tensors[EXPERT][1:]},
            rf"{EXPERT} is \(72, 128\) torch\.float32 in the rollout engine but \(71, 128\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(push(engine, bucket, 9))
    run(push(engine, tensors, 0))
    requests = some_requests()
    assert largest_difference(first, requests, run(engine.generate(requests, PLAIN)), 1.0) < 1e-4


@pytest.mark.slow
def test_bfloat16_experts(tmp_path, run):
    """vLLM has other kernels for them. Their rounding may send a token to another expert, so most tokens are compared."""
    folder = save_qwen3_moe(tmp_path, 2, **SIZES)
    engine = VLLMEngine(str(folder), "bfloat16", max_model_len=MAX_MODEL_LEN, load_weights=False)
    run(engine.ready())
    tensors = {name: tensor.bfloat16() for name, tensor in weights(folder).items()}
    run(push(engine, tensors, 1))
    requests = some_requests(16)
    generations = run(engine.generate(requests, PLAIN))
    engine._llm.shutdown()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    differences = []
    for request, generation in zip(requests, generations, strict=True):
        response = torch.tensor(ids(generation))
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *ids(generation)]])).logits[0].float()
        rows = torch.log_softmax(logits[len(request.prompt_ids) - 1 : -1], -1)
        expected = rows.gather(-1, response[:, None])[:, 0]
        differences.append((torch.tensor(generation.log_probs) - expected).abs())
    assert torch.cat(differences).median() < 0.05
