"""The local engine on a model with experts: transformers has those of a layer in one tensor, weight updates one by one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.engine.vllm_start import VLLMSettings, check_model, read_model
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import tensor_checksum
from tests.engine.tiny import some_requests
from tests.generations import ids, plain
from tests.tiny_qwen3_moe import EXPERTS, save_qwen3_moe

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=24)
LAYER = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of one architecture, with different weights."""
    return tuple(save_qwen3_moe(tmp_path_factory.mktemp("experts"), seed) for seed in (0, 1))  # type: ignore[return-value]


def loaded(folder: Path, dtype: str = "float32") -> LocalEngine:
    engine = LocalEngine(str(folder), dtype)
    engine.ready()
    return engine


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As they are sent: a tensor for each expert."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert f"{LAYER}.experts.{EXPERTS - 1}.gate_proj.weight" in tensors
    return tensors


def push(engine: LocalEngine, tensors: dict[str, torch.Tensor], version: int = 1) -> dict[str, str]:
    """In three buckets, each with some projections of every expert."""
    engine.begin_weight_update(check=True)
    for start in range(3):
        engine.load_weights(dict(list(tensors.items())[start::3]))
    return engine.finish_weight_update(version)


@pytest.mark.parametrize("width", [48, 45])
def test_log_probs_are_those_of_a_teacher_forced_pass(tmp_path, width):
    """Also of experts whose rows are no multiple of 16 bytes, which torch's grouped product refuses."""
    folder = save_qwen3_moe(tmp_path, 0, moe_intermediate_size=width)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    requests = some_requests()
    for request, generation in zip(requests, loaded(folder).generate(requests, PLAIN), strict=True):
        response = torch.tensor(ids(generation))
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *ids(generation)]])).logits[0]
        rows = logits[len(request.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(rows, -1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.log_probs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pushed_weights_are_those_of_a_fresh_engine(folders, dtype):
    """Every bit of them, so every response too."""
    first, second = folders
    engine, fresh = loaded(first, dtype), loaded(second, dtype)
    requests = some_requests()
    before = plain(engine.generate(requests, PLAIN))
    tensors = weights(second, getattr(torch, dtype))
    assert push(engine, tensors) == {name: tensor_checksum(name, tensor) for name, tensor in tensors.items()}
    held, expected = engine._model.state_dict(), fresh._model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    after = [(g.response_ids.tobytes(), g.log_probs.tobytes()) for g in engine.generate(requests, PLAIN)]
    assert after == [
        (g.response_ids.tobytes(), g.log_probs.tobytes()) for g in fresh.generate(requests, PLAIN)
    ]
    push(engine, weights(first, getattr(torch, dtype)), version=0)
    assert plain(engine.generate(requests, PLAIN)) == before


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_tensor_of_an_expert_is_named(folders, projection):
    tensors = weights(folders[1])
    name = f"{LAYER}.experts.3.{projection}.weight"
    del tensors[name]
    with pytest.raises(UserError, match=rf"lacks 1 of the engine's tensors, the first is {name}"):
        push(loaded(folders[0]), tensors)


def test_tensors_that_do_not_fit(folders):
    engine = loaded(folders[0])
    tensors = weights(folders[1])
    name = f"{LAYER}.experts.3.up_proj.weight"
    for bucket, message in (
        (
            {f"{LAYER}.experts.{EXPERTS}.up_proj.weight": tensors[name]},
            rf"has no weight .*\.{EXPERTS}\.up_proj",
        ),
        ({f"{LAYER}.experts.gate_up_proj": tensors[name]}, "has no weight .*gate_up_proj"),
        ({name: tensors[name][1:]}, rf"weight {name} is \(48, 64\) .* but \(47, 64\)"),
        ({name: tensors[name].bfloat16()}, rf"weight {name} is .* torch\.bfloat16 in the trainer"),
    ):
        engine.begin_weight_update(check=True)
        with pytest.raises(UserError, match=message):
            engine.load_weights(bucket)
    push(engine, tensors)


def test_an_engine_without_weights_serves_what_it_receives(folders):
    engine = LocalEngine(str(folders[0]), "float32", load_weights=False)
    engine.ready()
    push(engine, weights(folders[1]), version=4)
    requests = some_requests(2)
    assert [ids(g) for g in engine.generate(requests, PLAIN)] == [
        ids(g) for g in loaded(folders[1]).generate(requests, PLAIN)
    ]


def vllm_settings(folder: Path) -> VLLMSettings:
    return VLLMSettings(
        model_path=str(folder),
        dtype="float32",
        trust_remote_code=False,
        load_weights=False,
        max_model_len=64,
        tensor_parallel_size=1,
        gpu_memory_share=0.85,
        max_num_seqs=8,
        deterministic=False,
    )


def test_vllm_expects_every_expert(folders):
    """Its engine compares names, shapes and dtypes with these before a worker loads them."""
    model, tensors = read_model(vllm_settings(folders[0])), weights(folders[0])
    assert set(model.weights) == {*tensors, "lm_head.weight"}
    assert all(model.weights[name].shape == tuple(tensor.shape) for name, tensor in tensors.items())
    assert len({weight.storage for weight in model.weights.values()}) == len(tensors)
    assert model.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_width_that_vllm_on_cpus_does_not_take(tmp_path, folders):
    check_model(vllm_settings(folders[0]), read_model(vllm_settings(folders[0])), None)
    settings = vllm_settings(save_qwen3_moe(tmp_path, 0, hidden_size=80))
    model = read_model(settings)
    with pytest.raises(
        UserError, match=r"multiples of 32, but that of model.path .* is 80; choose rollout.engine=local"
    ):
        check_model(settings, model, None)
    check_model(settings, model, 80 * 2**30)
