"""Decoding with fixed tensors, run eagerly on a CPU, against decoding with a growing cache."""

import threading
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fipo.engine.decoding.cache import Layout, use_attention
from megatron_fipo.engine.decoding.graphs import MOST_GRAPHS, Graphs, Launches
from megatron_fipo.engine.decoding.rows import Row
from megatron_fipo.engine.decoding.static import REHEARSED, StaticDecoder
from megatron_fipo.engine.decoding.step import STEPS, State, Step
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.stop_strings import decoder
from megatron_fipo.errors import UserError
from tests.engine.conftest import loaded
from tests.engine.tiny import save_model, some_requests
from tests.generations import ids
from tests.tiny_qwen3_moe import save_qwen3_moe

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40)


class Recorder(Launches):
    """Notes the keys of steps, in order and without repetitions."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self.released = 0

    def run(self, key, step):
        if self.keys[-1:] != [key]:
            self.keys.append(key)
        super().run(key, step)

    def release(self):
        self.released += 1


def static(folder: Path, runner: Launches | None = None, **options) -> LocalEngine:
    """An engine as on a GPU, except that steps are not graphs."""
    engine = loaded(folder)
    engine._decoder = StaticDecoder(
        engine._model, engine._counts, engine._abort.is_set, runner or Launches(), **options
    )
    return engine


@pytest.fixture(scope="module")
def static_engine(model_folder: Path) -> LocalEngine:
    return static(model_folder)


def assert_same(found: list[Generation], expected: list[Generation]) -> None:
    """The same tokens and reasons, and log-probs to the rounding of float32."""
    for got, wanted in zip(found, expected, strict=True):
        assert ids(got) == ids(wanted)
        assert got.finish_reason == wanted.finish_reason
        assert got.log_probs == pytest.approx(wanted.log_probs, abs=3e-5)


def ragged(requests: list[GenerationRequest], complete: list[Generation]) -> list[GenerationRequest]:
    """Each response cut at another place."""
    return [
        replace(request, prefix=generation.response_ids[: index % max(1, len(ids(generation)))])
        for index, (request, generation) in enumerate(zip(requests, complete, strict=True))
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        replace(PLAIN, temperature=0.7),
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, top_p=0.7),
        replace(PLAIN, top_k=3, min_p=0.1, top_p=0.9),
        replace(PLAIN, stop_token_ids=(5, 9)),
        replace(PLAIN, max_new_tokens=1),
        replace(PLAIN, max_new_tokens=STEPS),
        replace(PLAIN, max_new_tokens=2 * STEPS + 1),
    ],
    ids=str,
)
def test_responses_are_those_of_a_growing_cache(shared_engine, static_engine, sampling):
    """Groups with a common prompt, prompts of unequal length, and the same counts."""
    requests = some_requests()
    before = [replace(engine._counts) for engine in (shared_engine, static_engine)]
    complete = shared_engine.generate(requests, sampling)
    assert_same(static_engine.generate(requests, sampling), complete)
    assert_same(
        static_engine.generate(ragged(requests, complete), sampling),
        shared_engine.generate(ragged(requests, complete), sampling),
    )
    added = [
        (engine._counts.computed - old.computed, engine._counts.generated - old.generated)
        for engine, old in zip((shared_engine, static_engine), before, strict=True)
    ]
    assert added[0] == added[1]


def long_requests() -> list[GenerationRequest]:
    """Prompts of 1 to 130 tokens, two responses to each."""
    return [
        GenerationRequest(
            f"{length}/{sample}",
            tuple(2 + (5 * place + length) % 30 for place in range(length)),
            seed=10 * length + sample,
        )
        for length in (1, 2, 60, 110, 125, 130, 3, 4)
        for sample in range(2)
    ]


def test_batches_shrink_and_lengths_grow(shared_engine, model_folder):
    recorder = Recorder()
    engine = static(model_folder, recorder)
    sampling = replace(PLAIN, max_new_tokens=150)
    assert_same(engine.generate(long_requests(), sampling), shared_engine.generate(long_requests(), sampling))
    sizes = [key[:2] for key in recorder.keys]
    widths, lengths = zip(*sizes, strict=True)
    assert sizes[0] == (16, 192)
    assert widths[-1] == 8
    assert list(widths) == sorted(widths, reverse=True)
    assert set(lengths) <= {128, 192, 256, 384}
    assert len(set(lengths)) > 1


def test_calls_of_other_sizes_share_the_memory(shared_engine, model_folder):
    """What an earlier call left in the memory has no effect, even if it was no number."""
    recorder = Recorder()
    engine = static(model_folder, recorder)
    calls = [
        (long_requests(), replace(PLAIN, max_new_tokens=150)),
        (some_requests(), PLAIN),
        (some_requests(2), PLAIN),
        (long_requests()[:3], PLAIN),
        (some_requests(), PLAIN),
    ]
    states = []
    for requests, sampling in calls:
        assert_same(engine.generate(requests, sampling), shared_engine.generate(requests, sampling))
        states.append(engine._decoder._state)
        for tensor in (*states[-1].stored.keys, *states[-1].stored.values):
            with torch.inference_mode():
                tensor.fill_(torch.nan)
    assert recorder.released == 2, "one state for the first call, and a wider one for the others"
    assert states[1:] == [states[1]] * 4


def test_responses_that_do_not_fit_wait(shared_engine, model_folder, capsys):
    layout = Layout.of(loaded(model_folder)._model)
    row = State.bytes_per_row(layout, 128)
    engine = static(model_folder, free_bytes=lambda: 1.25 * 11 * row + 10_000)
    requests = some_requests()
    assert_same(engine.generate(requests, PLAIN), shared_engine.generate(requests, PLAIN))
    assert capsys.readouterr().out.startswith(
        "rollout engine: device memory is enough for 8 of 24 responses of up to 128 tokens at a time"
    )
    engine._abort.set()
    assert_same(engine.generate(requests[:9], PLAIN), shared_engine.generate(requests[:9], PLAIN))
    assert not capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"one response of 384 tokens takes .* lower rollout.max_response_length"
    ):
        static(model_folder, free_bytes=lambda: row).generate(requests, replace(PLAIN, max_new_tokens=300))


@pytest.mark.parametrize("count", [1, 3, 11])
def test_an_abort_keeps_what_was_sampled(shared_engine, model_folder, count):
    """Between two chunks; the next call continues to the same end."""
    engine = static(model_folder)
    append, calls = engine._append, 0

    def aborting(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            aborter = threading.Thread(target=engine.abort)
            aborter.start()
            aborter.join()
        return append(*arguments)

    engine._append = aborting
    requests = some_requests()
    complete = shared_engine.generate(requests, PLAIN)
    first = engine.generate(requests, PLAIN)
    unfinished = [index for index, g in enumerate(first) if g.finish_reason == "abort"]
    assert unfinished
    for got, wanted in zip(first, complete, strict=True):
        assert ids(got) == ids(wanted)[: len(ids(got))]
        assert got.finish_reason in ("abort", wanted.finish_reason)
        assert got.finish_reason == "abort" or ids(got) == ids(wanted)
    lengths = {len(ids(first[index])) for index in unfinished}
    assert lengths == {STEPS * (-(-count // STEPS) + 1)}
    rest = engine.generate([replace(requests[i], prefix=first[i].response_ids) for i in unfinished], PLAIN)
    assert [ids(first[i]) + ids(g) for i, g in zip(unfinished, rest, strict=True)] == [
        ids(complete[i]) for i in unfinished
    ]


def test_stop_strings(shared_engine, static_engine, model_folder):
    text = decoder(str(model_folder), False)
    longest = max(shared_engine.generate(some_requests(), PLAIN), key=lambda g: len(ids(g)))
    sampling = replace(PLAIN, stop=(text(ids(longest)[4:6]), text(ids(longest)[9:11])))
    stopped = shared_engine.generate(some_requests(), sampling)
    assert_same(static_engine.generate(some_requests(), sampling), stopped)
    assert any(len(ids(a)) < len(ids(b)) for a, b in zip(stopped, [longest] * len(stopped), strict=True))


@pytest.mark.parametrize("width", [48, 45])
def test_mixtures_of_experts(tmp_path, width):
    folder = save_qwen3_moe(tmp_path, 0, moe_intermediate_size=width)
    requests, sampling = some_requests(), replace(PLAIN, max_new_tokens=24)
    assert_same(static(folder).generate(requests, sampling), loaded(folder).generate(requests, sampling))


def test_weights_keep_their_places(tmp_path):
    """Graphs point to them: an update copies into every tensor that the model reads."""
    old, new = save_model(tmp_path / "old", 1), save_model(tmp_path / "new", 2)
    engine = static(old)

    def places() -> dict[str, int]:
        tensors = (*engine._model.named_parameters(), *engine._model.named_buffers())
        return {name: tensor.data_ptr() for name, tensor in tensors}

    before, state = places(), None
    for version, folder in enumerate((new, old, new), 1):
        engine.begin_weight_update(check=True)
        for name, tensor in load_file(folder / "model.safetensors").items():
            engine.load_weights({name: tensor})
        engine.finish_weight_update(version)
        assert_same(engine.generate(some_requests(), PLAIN), loaded(folder).generate(some_requests(), PLAIN))
        assert places() == before
        assert state in (None, engine._decoder._state)
        state = engine._decoder._state


def test_sleep_frees_the_memory(shared_engine, model_folder):
    recorder = Recorder()
    engine = static(model_folder, recorder)
    expected = shared_engine.generate(some_requests(), PLAIN)
    for round in (1, 2):
        assert_same(engine.generate(some_requests(), PLAIN), expected)
        engine.sleep()
        assert engine._decoder._state is None
        assert recorder.released == 2 * round
        engine.wake()


@pytest.mark.parametrize("experts", [False, True])
def test_a_step_reads_no_value_on_the_host(tmp_path, experts):
    """It runs on the meta device, where tensors have none, so a CUDA graph can contain it."""
    folder = save_qwen3_moe(tmp_path, 0) if experts else save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    use_attention(model)
    layout = Layout.of(model)
    model.to("meta")
    state = State(layout, 16, 128, torch.device("meta"))
    step = Step(model)
    for sampling in REHEARSED:
        with torch.inference_mode():
            step(state, 8, 128, sampling)
    with pytest.raises(RuntimeError, match="meta"):
        state.step.item()


def test_a_rehearsal_runs_every_kind_of_step_twice(model_folder):
    recorder = Recorder()
    engine = static(model_folder, recorder)
    for parameter in engine._model.parameters():
        parameter.fill_(torch.nan)  # an engine without weights has any numbers
    engine._decoder.rehearse()
    assert len(recorder.keys) == len(REHEARSED)
    assert recorder.released == 1


def test_sliding_windows_are_refused(tmp_path):
    """Their cache is of another kind; the engine decodes such models with a growing one."""
    folder = save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match="do not keep all keys"):
        Layout.of(model)


def test_a_state_has_each_row_before_its_first_step(model_folder):
    requests = ragged(
        some_requests(2, n=2), [Generation(np.arange(4, dtype=np.int32), np.zeros(4), "stop", 0)] * 4
    )
    rows = [Row.of(request, 10) for request in requests]
    state = State(Layout.of(loaded(model_folder)._model), 8, 128, torch.device("cpu"))
    state.load(rows)
    tokens, positions, last, offsets = state.slots.tolist()
    for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
        assert row.context == (*request.prompt_ids, *range(index))
        assert tokens[index] == row.context[-1]
        assert positions[index] == len(row.context) - 1
        assert last[index] == len(request.prompt_ids) + 10 - 2
        found = state.uniforms[offsets[index] + positions[index] : offsets[index] + last[index] + 1]
        assert found.tolist() == np.random.default_rng(request.seed).random(10)[index:].tolist()


class Replayable(Graphs):
    """Graphs whose capture, which needs a GPU, is replaced by the step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[int] = []

    def _capture(self, step):
        class Captured:
            def replay(self) -> None:
                step()

        self.captured.append(1)
        return Captured()


def test_a_key_is_captured_at_its_second_step_and_the_number_of_graphs_is_bounded():
    graphs, ran = Replayable(), []
    for _ in range(3):
        graphs.run("a", lambda: ran.append("a"))
    assert (ran, len(graphs.captured)) == (["a"] * 3, 1)
    for key in range(MOST_GRAPHS):
        graphs.run(key, lambda: None)
        graphs.run(key, lambda: None)
    assert len(graphs._graphs) == MOST_GRAPHS
    assert "a" not in graphs._graphs, "the longest unused one"
    assert len(graphs.captured) == 1 + MOST_GRAPHS
