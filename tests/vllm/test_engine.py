"""The engine on the real vLLM compared with a teacher-forced pass of `transformers`, and with itself."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.protocol import NO_TOKENS, Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.stop_strings import Decode, decoder
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.engine.vllm_requests import seed_of
from megatron_fipo.errors import UserError
from megatron_fipo.weight_sync.checksum import tensor_checksum
from tests.generations import ids
from tests.tiny_qwen2 import END
from tests.vllm.model import MAX_MODEL_LEN, PLAIN, largest_difference, some_requests, weights

LONG = replace(PLAIN, max_new_tokens=150)
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=24)


@pytest.fixture
def engine(shared_engine, model_folder, run) -> VLLMEngine:
    """The session's engine with the weights of `model_folder`, restored if the previous test changed them."""
    if shared_engine._version != 0:
        run(push(shared_engine, weights(model_folder), 0))
    return shared_engine


async def push(
    engine: VLLMEngine, tensors: dict[str, torch.Tensor], version: int, buckets: int = 3
) -> dict[str, str]:
    await engine.begin_weight_update(check=True)
    for start in range(buckets):
        await engine.load_weights(dict(list(tensors.items())[start::buckets]))
    return await engine.finish_weight_update(version)


# -- generation ----------------------------------------------------------------------------------------------


def test_the_engine_reads_its_folder_as_transformers_does(shared_engine, sharded_folder, run):
    """The first test, on the weights that vLLM has loaded by itself."""
    assert shared_engine._version == 0
    requests = some_requests(4)
    generations = run(shared_engine.generate(requests, PLAIN))
    assert largest_difference(sharded_folder, requests, generations, 1.0) < 1e-4


@pytest.mark.parametrize(
    "change", [{}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}, {"temperature": 0.0}], ids=str
)
def test_log_probs_are_those_before_truncation(engine, model_folder, run, change):
    requests = some_requests()
    generations = run(engine.generate(requests, replace(PLAIN, **change)))
    assert largest_difference(model_folder, requests, generations, 1.0) < 1e-4


@pytest.mark.parametrize("change", [{"top_k": 3}, {"min_p": 0.5}], ids=str)
def test_top_k_and_min_p_truncate(engine, model_folder, run, change):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompt = some_requests(1)[0].prompt_ids
    probs = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1).detach()
    kept = set(probs.topk(3).indices.tolist())
    if "min_p" in change:
        kept = set((probs >= 0.5 * probs.max()).nonzero().flatten().tolist())
    requests = [GenerationRequest(f"{index}", prompt, index) for index in range(200)]
    sampling = replace(PLAIN, max_new_tokens=1, **change)
    assert {ids(generation)[0] for generation in run(engine.generate(requests, sampling))} <= kept
    assert len(kept) < 20


def test_top_p_truncates(engine, model_folder, run):
    """Only tokens of the nucleus are sampled, and not only the most likely one."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompt = some_requests(1)[0].prompt_ids
    probs = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1).detach()
    ordered, order = probs.sort(descending=True)
    nucleus = set(order[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    requests = [GenerationRequest(f"{index}", prompt, index) for index in range(200)]
    drawn = {ids(generation)[0] for generation in run(engine.generate(requests, SamplingParams(1.0, 0.5, 1)))}
    assert 1 < len(drawn) <= len(nucleus) < 20
    assert drawn <= nucleus


def test_greedy_takes_the_most_likely_token(engine, model_folder, run):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    request = some_requests(1)[0]
    context = list(request.prompt_ids)
    for token in ids(run(engine.generate([request], GREEDY))[0]):
        assert token == int(model(torch.tensor([context])).logits[0, -1].argmax())
        context.append(token)


def test_finish_reasons(engine, run):
    seen: Counter[str] = Counter()
    for generation in run(engine.generate(some_requests(64), replace(PLAIN, max_new_tokens=25))):
        seen[generation.finish_reason] += 1
        assert len(generation.log_probs) == len(ids(generation)) <= 25
        assert END not in ids(generation)[:-1]
        assert (ids(generation)[-1] == END) == (generation.finish_reason == "stop")
        if generation.finish_reason == "length":
            assert len(ids(generation)) == 25
        assert generation.weight_version == 0
    assert min(seen["stop"], seen["length"]) > 5


def some_string(text: Decode, generations: list[Generation]) -> tuple[Generation, int, str]:
    """Text of three tokens of a generation, the index of the first of them, as late as they are its first occurrence."""
    found = [
        (start, index)
        for index, generation in enumerate(generations)
        for start in range(len(ids(generation)) - 3)
        if text(ids(generation)[start : start + 3]) not in text(ids(generation)[: start + 2])
    ]
    start, index = max(found)
    return generations[index], start, text(ids(generations[index])[start : start + 3])


def test_a_response_ends_with_a_stop_string(engine, model_folder, run):
    """Each character is a token, so the string is completed by its third."""
    text = decoder(str(model_folder), False)
    requests = some_requests(32)
    free = run(engine.generate(requests, GREEDY))
    _, _, string = some_string(text, free)
    generations = run(engine.generate(requests, replace(GREEDY, stop=(string, "never"))))
    for generation, unlimited in zip(generations, free, strict=True):
        end = text(ids(unlimited)).find(string)
        if end < 0:
            assert ids(generation) == ids(unlimited)
        else:
            assert text(ids(generation)).endswith(string)
            assert ids(generation) == ids(unlimited)[: len(ids(generation))]
            assert string not in text(ids(generation)[:-1])
            assert generation.finish_reason == "stop"
        assert len(generation.log_probs) == len(ids(generation))


def test_a_stop_string_that_began_before_an_abort_ends_the_response(engine, model_folder, run):
    text = decoder(str(model_folder), False)
    requests = some_requests(16)
    free = run(engine.generate(requests, GREEDY))
    chosen, start, string = some_string(text, free)
    request = requests[free.index(chosen)]
    cut = replace(request, prefix=chosen.response_ids[: start + 2])
    (rest,) = run(engine.generate([cut], replace(GREEDY, stop=(string,))))
    assert ids(rest) == ids(chosen)[start + 2 : start + 3]
    assert rest.finish_reason == "stop"
    assert len(rest.log_probs) == 1


def test_a_stop_token_ends_the_response(engine, run):
    free = run(engine.generate(some_requests(1), GREEDY))[0]
    token = ids(free)[5]
    (generation,) = run(engine.generate(some_requests(1), replace(GREEDY, stop_token_ids=(token,))))
    assert ids(generation) == ids(free)[: ids(free).index(token) + 1]
    assert generation.finish_reason == "stop"


def test_responses_to_one_prompt_differ(engine, run):
    """Requests have no seeds of their own here."""
    requests = [replace(some_requests(1)[0], request_id=f"{index}") for index in range(8)]
    assert len({tuple(ids(generation)) for generation in run(engine.generate(requests, PLAIN))}) > 4


@pytest.mark.parametrize(("prompt_tokens", "computed_once"), [(199 - 8, 128), (100, 0)])
def test_the_responses_of_a_group_share_the_blocks_of_their_prompt(engine, run, prompt_tokens, computed_once):
    """All 16 requests of a call reach vLLM before it has computed any. On a CPU a block of the cache has 128 tokens."""
    prompt = tuple(2 + (7 * position + prompt_tokens) % 29 for position in range(prompt_tokens))
    requests = [GenerationRequest(f"{index}", prompt, index) for index in range(16)]
    before = run(engine.status())
    run(engine.generate(requests, replace(PLAIN, max_new_tokens=8)))
    after = run(engine.status())
    assert after.prefix_queries - before.prefix_queries == 16 * prompt_tokens
    assert after.prefix_hits - before.prefix_hits == 15 * computed_once


def test_a_prefix_is_continued(engine, model_folder, run):
    full = run(engine.generate(some_requests(32), PLAIN))
    cut = [
        replace(r, prefix=g.response_ids[:10])
        for r, g in zip(some_requests(32), full, strict=True)
        if len(ids(g)) > 10
    ]
    rest = run(engine.generate(cut, PLAIN))
    assert largest_difference(model_folder, cut, rest, 1.0) < 1e-4
    assert {len(ids(generation)) for generation in rest if generation.finish_reason == "length"} == {30}
    assert len({ids(generation)[0] for generation in rest}) > 3
    assert seed_of(cut[0]) not in (
        seed_of(replace(cut[0], prefix=NO_TOKENS)),
        seed_of(replace(cut[0], prefix=cut[0].prefix[:5])),
    )


def test_abort_returns_partial_responses(engine, model_folder, run):
    requests = some_requests(300)

    async def interrupted() -> list:
        calls = [
            asyncio.create_task(engine.generate(requests[start : start + 100], LONG))
            for start in (0, 100, 200)
        ]
        await engine.generate(
            some_requests(1), replace(PLAIN, max_new_tokens=2)
        )  # returns after the first step of the others
        await engine.abort()
        return [generation for call in calls for generation in await asyncio.wait_for(call, 30)]

    generations = run(interrupted())
    partial = [generation for generation in generations if generation.finish_reason == "abort"]
    assert any(ids(generation) for generation in partial)
    assert all(len(ids(generation)) < 150 for generation in partial)
    assert largest_difference(model_folder, requests[:40], generations[:40], 1.0) < 1e-4
    assert {generation.finish_reason for generation in run(engine.generate(requests[:4], PLAIN))} <= {
        "stop",
        "length",
    }


def test_abort_strikes_calls_that_have_just_begun(engine, run):
    async def interrupted() -> list:
        call = asyncio.create_task(engine.generate(some_requests(50), PLAIN))
        await asyncio.sleep(0)
        await engine.abort()
        return await asyncio.wait_for(call, 30)

    generations = run(interrupted())
    assert len(generations) == 50
    assert {generation.finish_reason for generation in generations} == {"abort"}


def test_status_reports_what_the_engine_core_computed_and_holds(engine, run):
    run(
        engine.generate(some_requests(1), PLAIN)
    )  # the core reports aborted requests of other tests with its next step
    before = run(engine.status())
    assert before.kv_tokens >= MAX_MODEL_LEN
    assert before.waiting == 0
    requests = some_requests(20)

    async def watched() -> tuple[list, list]:
        call = asyncio.create_task(engine.generate(requests, PLAIN))
        seen = []
        while not call.done():
            seen.append(await engine.status())
            await asyncio.sleep(0.01)
        return await call, seen

    generations, seen = run(watched())
    counts = [status.tokens for status in seen]
    assert max(status.running for status in seen) > 1
    assert 0 < max(status.kv_use for status in seen) <= 1
    assert counts == sorted(counts)
    assert len(set(counts)) > 5, "it must grow during a call"
    prompts = sum(len(request.prompt_ids) for request in requests)
    responses = sum(len(ids(generation)) for generation in generations)
    after = run(engine.status())
    assert after.tokens - before.tokens == prompts + responses
    assert after.generated_tokens - before.generated_tokens == responses
    assert after.preemptions == before.preemptions
    assert after.prefix_queries - before.prefix_queries == prompts
    assert 0 <= after.prefix_hits - before.prefix_hits < prompts
    assert run(engine.status()).tokens == run(engine.status()).tokens


def test_status_counts_prompt_tokens_found_in_the_prefix_cache(engine, run):
    """The prompt is longer than a cache block (128 tokens): its second request finds the first block."""
    request = GenerationRequest("repeated", tuple(2 + 13 * position % 30 for position in range(150)), 1)
    counts = []
    for _ in range(2):
        before = run(engine.status())
        run(engine.generate([request], PLAIN))
        after = run(engine.status())
        counts.append((after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits))
    assert counts == [(150, 0), (150, 128)]


def test_a_prompt_beyond_the_length_limit(engine, run):
    with pytest.raises(
        UserError,
        match=r"request long has a prompt of 161 tokens, .* response of 40 exceeds the engine's 200",
    ):
        run(engine.generate([GenerationRequest("long", (5,) * 161, 1)], PLAIN))
    run(engine.generate([GenerationRequest("long", (5,) * 160, 1)], PLAIN))


# -- weights -------------------------------------------------------------------------------------------------


def test_pushed_weights_generate_as_transformers_does(engine, other_folder, model_folder, run):
    requests = some_requests()
    before = run(engine.generate(requests, GREEDY))
    tensors = weights(other_folder)
    assert run(push(engine, tensors, 7)) == {
        name: tensor_checksum(name, tensor) for name, tensor in tensors.items()
    }
    assert run(engine.status()).weight_version == 7
    after = run(engine.generate(requests, GREEDY))
    assert {generation.weight_version for generation in after} == {7}
    assert largest_difference(other_folder, requests, after, 1.0) < 1e-4
    assert [ids(g) for g in after] != [ids(g) for g in before]
    model = AutoModelForCausalLM.from_pretrained(other_folder, dtype=torch.float32)
    for request, generation in zip(requests, after, strict=True):
        context = torch.tensor([[*request.prompt_ids, *ids(generation)]])
        likeliest = model(context).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == list(ids(generation))


def test_no_cached_keys_and_values_survive_an_update(engine, other_folder, run):
    """The prompt is longer than a cache block (128 tokens): its second request would find the first block."""
    request = GenerationRequest("long", tuple(2 + 11 * position % 30 for position in range(150)), 1)
    run(engine.generate([request], PLAIN))
    run(push(engine, weights(other_folder), 2))
    assert largest_difference(other_folder, [request], run(engine.generate([request], PLAIN)), 1.0) < 1e-4


@pytest.mark.parametrize("started", [False, True])
def test_generation_stops_for_an_update(engine, model_folder, run, started):
    """A call that is still submitting its requests, and one that is running."""

    async def both() -> list:
        call = asyncio.create_task(engine.generate(some_requests(200), LONG))
        await asyncio.sleep(0)
        if started:
            await engine.generate(some_requests(1), replace(PLAIN, max_new_tokens=2))
        await engine.begin_weight_update(check=True)
        generations = await asyncio.wait_for(call, 30)
        with pytest.raises(RuntimeError, match="during a weight update"):
            await engine.generate(some_requests(1), PLAIN)
        return generations

    assert "abort" in {generation.finish_reason for generation in run(both())}
    run(push(engine, weights(model_folder), 1))


@pytest.mark.parametrize("how", ["abandoned", "failed"])
def test_an_update_after_a_broken_one(engine, model_folder, other_folder, run, how):
    """Layers that the incomplete update filled in part load all new weights."""
    broken = {name: tensor + 1 for name, tensor in weights(model_folder).items()}

    async def break_it() -> None:
        await engine.begin_weight_update(check=True)
        await engine.load_weights(dict(list(broken.items())[::2]))
        if how == "failed":
            with pytest.raises(Exception, match="No such file"):
                await engine._update_workers(
                    {"names": [], "dtype_names": [], "shapes": [], "path": "/nowhere", "check": True}
                )

    run(break_it())
    run(push(engine, weights(other_folder), 3))
    requests = some_requests()
    assert largest_difference(other_folder, requests, run(engine.generate(requests, PLAIN)), 1.0) < 1e-4


def test_tied_weights_may_come_under_both_names(engine, other_folder, run):
    tensors = weights(other_folder)
    run(push(engine, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, 4))
    requests = some_requests()
    assert largest_difference(other_folder, requests, run(engine.generate(requests, PLAIN)), 1.0) < 1e-4


def test_weights_that_do_not_fit(engine, model_folder, run):
    tensors = weights(model_folder)
    name = "model.layers.1.mlp.down_proj.weight"

    async def update(*buckets: dict[str, torch.Tensor]) -> None:
        await engine.begin_weight_update(check=True)
        for bucket in buckets:
            await engine.load_weights(bucket)
        await engine.finish_weight_update(9)

    for buckets, message in (
        (
            [{"model.layers.2.mlp.down_proj.weight": tensors[name]}],
            r"no weight model\.layers\.2\.mlp\.down_proj\.weight",
        ),
        (
            [{name: tensors[name][1:]}],
            rf"{name} is \(128, 192\) torch\.float32 in the rollout engine but \(127, 192\)",
        ),
        ([{name: tensors[name].bfloat16()}], rf"{name} is .* but \(128, 192\) torch\.bfloat16"),
        ([tensors, {name: tensors[name]}], rf"{name} came twice"),
        ([{other: tensor for other, tensor in tensors.items() if other != name}], rf"lacks 1 of .* {name}"),
    ):
        with pytest.raises(UserError, match=message):
            run(update(*buckets))
    run(push(engine, tensors, 5))
    requests = some_requests()
    assert largest_difference(model_folder, requests, run(engine.generate(requests, PLAIN)), 1.0) < 1e-4
