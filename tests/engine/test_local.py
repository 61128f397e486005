"""The local engine compared with a teacher-forced pass of the model, and with itself in other batches."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import tensor_checksum
from tests.engine.conftest import loaded
from tests.engine.tiny import save_model, some_requests
from tests.generations import ids, plain
from tests.tiny_qwen2 import END

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def teacher_forced(
    model: torch.nn.Module, request: GenerationRequest, generation: Generation, temperature: float
) -> torch.Tensor:
    response = torch.tensor(ids(generation))
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *ids(generation)]])).logits[0]
    rows = logits[len(request.prompt_ids) - 1 : -1] / temperature
    return torch.log_softmax(rows, -1).gather(-1, response[:, None])[:, 0]


def tokens(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [ids(generation) for generation in generations]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (0.0, 1.0)])
def test_log_probs_are_those_of_a_teacher_forced_pass(shared_engine, reference, temperature, top_p):
    requests = some_requests()
    generations = shared_engine.generate(requests, SamplingParams(temperature, top_p, 40))
    for request, generation in zip(requests, generations, strict=True):
        expected = teacher_forced(reference, request, generation, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(generation.log_probs), expected, atol=1e-5, rtol=0)


def test_greedy_takes_the_most_likely_token(shared_engine, reference):
    first, second = some_requests(1, n=2)
    answer, same = shared_engine.generate([first, second], SamplingParams(0.0, 1.0, 20))
    context = list(first.prompt_ids)
    for token in ids(answer):
        with torch.no_grad():
            assert token == int(reference(torch.tensor([context])).logits[0, -1].argmax())
        context.append(token)
    assert plain(answer) == plain(same)


def test_a_response_depends_on_its_own_seed_only(shared_engine):
    requests = some_requests()
    together = shared_engine.generate(requests, PLAIN)
    assert plain(shared_engine.generate(requests, PLAIN)) == plain(together)
    alone = [shared_engine.generate([request], PLAIN)[0] for request in requests[:5]]
    assert tokens(alone) == tokens(together)[:5]
    assert tokens(shared_engine.generate(requests[::-1], PLAIN)[::-1]) == tokens(together)
    reseeded = shared_engine.generate(
        [replace(request, seed=request.seed + 1) for request in requests], PLAIN
    )
    assert tokens(reseeded) != tokens(together)


def test_responses_to_equal_prompts_differ(shared_engine):
    requests = some_requests(n=8)
    answers = tokens(shared_engine.generate(requests, PLAIN))
    assert requests[0].prompt_ids == requests[-1].prompt_ids
    assert all(len(set(answers[first : first + 8])) > 1 for first in range(0, len(answers), 8))
    assert answers[:8] != answers[-8:]


def test_finish_reasons(shared_engine):
    seen: Counter[str] = Counter()
    for generation in shared_engine.generate(some_requests(n=16), SamplingParams(1.0, 1.0, 12)):
        seen[generation.finish_reason] += 1
        assert len(generation.log_probs) == len(ids(generation)) <= 12
        assert END not in ids(generation)[:-1]
        if generation.finish_reason == "stop":
            assert ids(generation)[-1] == END
        else:
            assert generation.finish_reason == "length"
            assert len(ids(generation)) == 12
            assert ids(generation)[-1] != END
    assert seen["stop"] > 5
    assert seen["length"] > 5


@pytest.mark.parametrize("sampling", [PLAIN, SamplingParams(0.7, 0.8, 40), SamplingParams(0.0, 1.0, 40)])
def test_a_continued_response_is_the_uninterrupted_one(shared_engine, sampling):
    """Rows are cut at different positions: one batch has prefixes of all lengths, also up to the end."""
    requests = some_requests(n=6)
    complete = shared_engine.generate(requests, sampling)
    cuts = [index % max(1, len(ids(generation))) for index, generation in enumerate(complete)]
    prefixes = [ids(generation)[:cut] for generation, cut in zip(complete, cuts, strict=True)]
    rest = shared_engine.generate(
        [replace(r, prefix=np.array(p, dtype=np.int32)) for r, p in zip(requests, prefixes, strict=True)],
        sampling,
    )
    assert [p + ids(generation) for p, generation in zip(prefixes, rest, strict=True)] == tokens(complete)
    assert [generation.finish_reason for generation in rest] == [
        generation.finish_reason for generation in complete
    ]
    for generation, full, cut in zip(rest, complete, cuts, strict=True):
        assert generation.log_probs == pytest.approx(full.log_probs[cut:], abs=1e-5)


class SlowEngine(LocalEngine):
    """Aborts itself from another thread after some decode steps."""

    steps = 0
    abort_at = 0

    def _append(self, *args):
        self.steps += 1
        if self.steps == self.abort_at:
            aborter = threading.Thread(target=self.abort)
            aborter.start()
            aborter.join()
        return super()._append(*args)


@pytest.mark.parametrize("steps", [1, 5, 17])
def test_abort_returns_what_there_is_and_the_next_call_runs_to_the_end(shared_engine, model_folder, steps):
    engine = SlowEngine(str(model_folder), "float32")
    engine.ready()
    engine.abort_at = steps
    requests = some_requests()
    complete = shared_engine.generate(requests, PLAIN)
    first = engine.generate(requests, PLAIN)
    assert [ids(g) for g in first] == [ids(g)[:steps] for g in complete]
    finished = [len(ids(g)) <= steps for g in complete]
    assert [g.finish_reason for g in first] == [
        w.finish_reason if done else "abort" for w, done in zip(complete, finished, strict=True)
    ]
    unfinished = [index for index, done in enumerate(finished) if not done]
    assert unfinished
    rest = engine.generate([replace(requests[i], prefix=first[i].response_ids) for i in unfinished], PLAIN)
    assert [ids(first[i]) + ids(g) for i, g in zip(unfinished, rest, strict=True)] == [
        ids(complete[i]) for i in unfinished
    ]


def test_status_and_abort_do_not_wait_for_a_call(shared_engine):
    with shared_engine._using_model:
        assert shared_engine.status().weight_version == 0
        shared_engine.abort()


@pytest.mark.parametrize("tied", [True, False])
def test_updated_weights_generate_as_a_fresh_engine_does(tmp_path, tied):
    old, new = save_model(tmp_path / "old", 1, tied), save_model(tmp_path / "new", 2, tied)
    engine, fresh = loaded(old), loaded(new)
    requests = some_requests()
    before, wanted = engine.generate(requests, PLAIN), fresh.generate(requests, PLAIN)
    assert tokens(before) != tokens(wanted)
    engine.begin_weight_update(check=True)
    weights = list(AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).named_parameters())
    assert ("lm_head.weight" in dict(weights)) is not tied
    for name, tensor in weights:
        engine.load_weights({name: tensor})
    assert engine.status().weight_version == 0
    assert engine.finish_weight_update(7) == {name: tensor_checksum(name, tensor) for name, tensor in weights}
    assert engine.status().weight_version == 7
    assert plain(engine.generate(requests, PLAIN)) == plain(
        [replace(generation, weight_version=7) for generation in wanted]
    )


def test_tied_weights_may_come_by_either_name(tmp_path):
    engine = loaded(save_model(tmp_path))
    weights = {
        name: tensor.clone()
        for name, tensor in engine._weights().items()
        if name != "model.embed_tokens.weight"
    }
    engine.begin_weight_update(check=False)
    engine.load_weights(weights)
    assert engine.finish_weight_update(1) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_without_weights_serves_after_its_first_update(tmp_path, tied):
    folder = save_model(tmp_path / "complete", 3, tied)
    weightless = save_model(tmp_path / "weightless", 3, tied)
    (weightless / "model.safetensors").unlink()
    engine = LocalEngine(str(weightless), "float32", load_weights=False)
    engine.ready()
    assert engine.status().weight_version == -1
    with pytest.raises(RuntimeError, match="before there were weights"):
        engine.generate(some_requests(1), PLAIN)
    engine.begin_weight_update(check=True)
    engine.load_weights(
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    )
    engine.finish_weight_update(0)
    # Not bit for bit: tensors read from a file have another alignment in memory, which changes rounding in
    # kernels.
    for got, wanted in zip(
        engine.generate(some_requests(), PLAIN), loaded(folder).generate(some_requests(), PLAIN), strict=True
    ):
        assert ids(got) == ids(wanted)
        assert got.log_probs == pytest.approx(wanted.log_probs, abs=1e-5)


def test_half_an_update_serves_nothing(tmp_path):
    engine = loaded(save_model(tmp_path))
    name, tensor = next(iter(engine._weights().items()))
    engine.begin_weight_update(check=True)
    engine.load_weights({name: tensor.clone()})
    with pytest.raises(UserError, match=r"lacks \d+ of the engine's tensors"):
        engine.finish_weight_update(1)
    with pytest.raises(RuntimeError, match="during a weight update"):
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
    engine.begin_weight_update(check=True)
    with pytest.raises(UserError, match=message):
        engine.load_weights(bucket)


def test_unusable_folders_are_refused_in_one_sentence(tmp_path):
    def message(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            LocalEngine(str(folder), "float32").ready()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model folder" in message(tmp_path / "absent")
    assert "set eos_token in tokenizer_config.json" in message(
        save_model(tmp_path / "endless", end_token=False)
    )
    corrupt = save_model(tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "not a readable safetensors file" in message(corrupt)
    weightless = save_model(tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "only safetensors are supported" in message(weightless)
    unknown = save_model(tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    assert "none named" in message(unknown)


def test_status_counts_the_tokens_computed(shared_engine):
    before = shared_engine.status().tokens
    requests = some_requests()
    generations = shared_engine.generate(requests, PLAIN)
    prompts = {request.prompt_ids for request in requests}
    computed = sum(map(len, prompts)) + sum(len(ids(generation)) for generation in generations)
    assert shared_engine.status().tokens - before == computed


def test_status_counts_sampled_and_repeated_tokens(model_folder):
    engine = loaded(model_folder)
    requests = some_requests()
    generations = engine.generate(requests, PLAIN)
    status = engine.status()
    assert status.generated_tokens == sum(len(generation.response_ids) for generation in generations)
    brought = sum(len(request.prompt_ids) for request in requests)
    assert status.prefix_queries == brought
    assert brought - status.prefix_hits == status.tokens - status.generated_tokens
    assert status.prefix_hits > brought / 2, "each prompt has four responses"
    assert (status.running, status.waiting, status.kv_use, status.preemptions) == (0, 0, None, None)


def test_status_shows_the_rows_that_are_decoded(model_folder):
    engine = loaded(model_folder)
    seen: list[int] = []
    append = engine._append

    def watched(*arguments):
        seen.append(engine.status().running)
        return append(*arguments)

    engine._append = watched
    engine.generate(some_requests(prompts=2, n=4), PLAIN)
    assert seen[0] == 8
    assert seen == sorted(seen, reverse=True)
    assert engine.status().running == 0
