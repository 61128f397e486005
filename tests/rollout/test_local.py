"""The local engine against a teacher-forced pass of the same model, and against itself under other batches."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.errors import UserError
from megatron_fipo.rollout import local
from megatron_fipo.rollout.local import LocalEngine, sample_tokens
from megatron_fipo.rollout.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.rollout.weight_sync import WeightChecksum
from tests.rollout.conftest import loaded
from tests.rollout.tiny import END, save_model, some_requests

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40)


def teacher_forced(folder: Path, request: GenerationRequest, generation: Generation, temperature: float) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    response = torch.tensor(generation.response_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *generation.response_ids]])).logits[0]
    rows = logits[len(request.prompt_ids) - 1 : -1] / temperature
    return torch.log_softmax(rows, -1).gather(-1, response[:, None])[:, 0]


def tokens(results: list[list[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[generation.response_ids for generation in answer] for answer in results]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (0.0, 1.0)])
def test_log_probs_are_those_of_a_teacher_forced_pass(shared_engine, model_folder, temperature, top_p):
    requests = some_requests()
    results = shared_engine.generate(requests, SamplingParams(temperature, top_p, 40))
    for request, answer in zip(requests, results, strict=True):
        for generation in answer:
            expected = teacher_forced(model_folder, request, generation, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(generation.log_probs), expected, atol=1e-5, rtol=0)


def test_greedy_takes_the_most_likely_token(shared_engine, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    request = some_requests(1, n=2)[0]
    first, second = shared_engine.generate([request], SamplingParams(0.0, 1.0, 20))[0]
    ids = list(request.prompt_ids)
    for token in first.response_ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert first == second


def test_a_response_depends_on_its_own_seed_only(shared_engine, monkeypatch):
    requests = some_requests()
    together = shared_engine.generate(requests, PLAIN)
    assert shared_engine.generate(requests, PLAIN) == together
    alone = [shared_engine.generate([request], PLAIN)[0] for request in requests]
    assert tokens(alone) == tokens(together)
    assert tokens(shared_engine.generate(requests[::-1], PLAIN)[::-1]) == tokens(together)
    fewer = shared_engine.generate([replace(request, n=2) for request in requests], PLAIN)
    assert tokens(fewer) == [answer[:2] for answer in tokens(together)]
    monkeypatch.setattr(local, "MAX_ROWS", 5)
    assert tokens(shared_engine.generate(requests, PLAIN)) == tokens(together)


def test_responses_of_a_request_and_of_equal_prompts_differ(shared_engine):
    requests = some_requests(n=8)
    answers = tokens(shared_engine.generate(requests, PLAIN))
    assert requests[0].prompt_ids == requests[-1].prompt_ids
    assert all(len(set(answer)) > 1 for answer in answers)
    assert answers[0] != answers[-1]


def test_finish_reasons(shared_engine):
    seen: Counter[str] = Counter()
    for answer in shared_engine.generate(some_requests(n=16), SamplingParams(1.0, 1.0, 12)):
        for generation in answer:
            seen[generation.finish_reason] += 1
            assert len(generation.log_probs) == len(generation.response_ids) <= 12
            assert END not in generation.response_ids[:-1]
            if generation.finish_reason == "stop":
                assert generation.response_ids[-1] == END
            else:
                assert generation.finish_reason == "length"
                assert len(generation.response_ids) == 12
                assert generation.response_ids[-1] != END
    assert seen["stop"] > 5
    assert seen["length"] > 5


def test_sampling_follows_the_distribution_and_top_p_truncates():
    """Inverse CDF on an even grid of uniform numbers gives each token its exact share."""
    probs = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = probs.log().expand(len(grid), -1)

    def shares(sampling: SamplingParams) -> list[float]:
        drawn, log_probs = sample_tokens(logits, grid, sampling)
        torch.testing.assert_close(log_probs, torch.log_softmax(logits / sampling.temperature, -1)[0, drawn])
        return (torch.bincount(drawn, minlength=5) / len(grid)).tolist()

    assert shares(SamplingParams(1.0, 1.0, 1)) == pytest.approx(probs.tolist(), abs=2e-4)
    assert shares(SamplingParams(0.5, 1.0, 1)) == pytest.approx((probs**2 / (probs**2).sum()).tolist(), abs=2e-4)
    assert shares(SamplingParams(1.0, 0.69, 1)) == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=2e-4)
    assert shares(SamplingParams(1.0, 0.75, 1)) == pytest.approx([0, 0.4 / 0.95, 0, 0.25 / 0.95, 0.3 / 0.95], abs=2e-4)


def test_extreme_uniform_numbers_never_draw_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.1, 0.7, -torch.inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, PLAIN)[0].tolist() == [1, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_updated_weights_generate_as_a_fresh_engine_does(tmp_path, tied):
    old, new = save_model(tmp_path / "old", 1, tied), save_model(tmp_path / "new", 2, tied)
    engine, fresh = loaded(old), loaded(new)
    requests = some_requests()
    before, wanted = engine.generate(requests, PLAIN), fresh.generate(requests, PLAIN)
    assert tokens(before) != tokens(wanted)
    engine.begin_weight_update()
    checksum = WeightChecksum()
    weights = list(AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).named_parameters())
    assert ("lm_head.weight" in dict(weights)) is not tied
    for name, tensor in weights:
        engine.load_weights({name: tensor})
        checksum.add(name, tensor)
    assert engine.finish_weight_update(7) == checksum.hexdigest()
    after = engine.generate(requests, PLAIN)
    assert after == [[replace(generation, weight_version=7) for generation in answer] for answer in wanted]


def test_tied_weights_may_come_by_either_name(tmp_path):
    engine = loaded(save_model(tmp_path))
    weights = {name: tensor.clone() for name, tensor in engine._held().items() if name != "model.embed_tokens.weight"}
    engine.begin_weight_update()
    engine.load_weights(weights)
    engine.finish_weight_update(1)


def test_half_an_update_serves_nothing(tmp_path):
    engine = loaded(save_model(tmp_path))
    name, tensor = next(iter(engine._held().items()))
    engine.begin_weight_update()
    engine.load_weights({name: tensor.clone()})
    with pytest.raises(UserError, match=r"lacks \d+ of the engine's tensors"):
        engine.finish_weight_update(1)
    with pytest.raises(RuntimeError, match="within a weight update"):
        engine.generate(some_requests(1), PLAIN)


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ({"model.nothing.weight": torch.zeros(2)}, "no weight model.nothing.weight"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight is \(32,\)"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_unfit_weights_are_refused(tmp_path, bucket, message):
    engine = loaded(save_model(tmp_path))
    engine.begin_weight_update()
    with pytest.raises(UserError, match=message):
        engine.load_weights(bucket)


def test_unusable_folders_are_refused_in_one_sentence(tmp_path):
    def message(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            LocalEngine(str(folder), "float32").ready()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder with a config.json" in message(tmp_path / "absent")
    assert "end-of-sequence" in message(save_model(tmp_path / "endless", end_token=False))
    corrupt = save_model(tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "can't load" in message(corrupt)
    weightless = save_model(tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "can't load" in message(weightless)
    unknown = save_model(tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    assert "can't load" in message(unknown)
