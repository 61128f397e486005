"""Stop strings on byte-level tokens: characters of several bytes, strings of several tokens, responses that were continued."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.engine.stop_strings import StopStrings, decoder
from tests.engine.tiny import some_requests
from tests.generations import ids
from tests.tiny_qwen2 import END

VOCABULARY = [
    b"a",
    b"b",
    b"</",
    b"ab",
    b"</a",
    b">",
    b"b>x",
    "é".encode(),
    *(bytes([b]) for b in "é→".encode()),
]
STOPS = ["</a>", "ab", "é", "→b", "b>"]


def decode(tokens) -> str:
    return b"".join(VOCABULARY[token] for token in tokens).decode("utf-8", errors="replace")


def reference(tokens: list[int], stop: list[str]) -> int | None:
    """The number of tokens up to the first whose text contains a string, by decoding everything."""
    counts = range(1, len(tokens) + 1)
    return next((n for n in counts if any(text in decode(tokens[:n]) for text in stop)), None)


@given(
    st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=30),
    st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
    st.integers(0, 30),
)
def test_the_first_token_that_completes_a_string_is_found(tokens, stop, cut):
    found = StopStrings(stop, decode)
    expected = reference(tokens, stop)
    prefix = tokens[: min(cut, len(tokens) if expected is None else expected - 1)]
    rest = tokens[len(prefix) :]
    ends = (n for n in range(1, len(rest) + 1) if found.ends(prefix, rest[:n]))
    assert next(ends, None) == (None if expected is None else expected - len(prefix))
    across = found.end_across(prefix, rest)
    if prefix and expected is not None and reference(rest, stop) not in range(1, expected - len(prefix) + 1):
        assert across == expected - len(prefix), (
            "the engine, which sees the rest only, does not find it there"
        )
    assert across is None or across == expected - len(prefix)


@given(
    st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_a_string_in_the_prefix_ended_an_earlier_turn(earlier, rest):
    """After a complete string in the prefix, only one that ends in a later token ends the turn."""
    prefix = [*earlier, 0, 1]  # a, b
    for count in range(1, len(rest) + 1):
        before, text = decode([*prefix, *rest[: count - 1]]), decode([*prefix, *rest[:count]])
        ends = any(text.endswith("ab", 0, end) for end in range(len(before) + 1, len(text) + 1))
        assert StopStrings(["ab"], decode).ends(prefix, rest[:count]) == ends


def test_a_character_of_several_tokens_is_found():
    first, second = 8, 9
    assert decode([first, second]) == "é"
    assert StopStrings(["é"], decode).ends([0, first], [second])
    assert not StopStrings(["é"], decode).ends([0, first, second], [0])


def test_the_local_engine_stops_and_continues(shared_engine: LocalEngine, model_folder):
    text = decoder(str(model_folder), False)
    free = SamplingParams(1.0, 1.0, 40)
    requests = some_requests()
    unlimited = shared_engine.generate(requests, free)
    index, generation = max(enumerate(unlimited), key=lambda pair: len(ids(pair[1])))
    string = text(ids(generation)[4:7])
    sampling = SamplingParams(1.0, 1.0, 40, stop=(string, "never"))
    for stopped, whole in zip(shared_engine.generate(requests, sampling), unlimited, strict=True):
        ends = (n for n in range(1, len(ids(whole)) + 1) if string in text(ids(whole)[:n]))
        end = next(ends, len(ids(whole)))
        assert ids(stopped) == ids(whole)[:end]
        assert len(stopped.log_probs) == end
        assert stopped.finish_reason == ("stop" if string in text(ids(whole)) else whole.finish_reason)
    cut = replace(requests[index], prefix=generation.response_ids[:5])
    (rest,) = shared_engine.generate([cut], sampling)
    assert (*ids(generation)[:5], *ids(rest)) == ids(generation)[:7]


def test_a_stop_token_ends_a_response(shared_engine):
    requests = some_requests()
    whole = ids(shared_engine.generate(requests, SamplingParams(1.0, 1.0, 40))[0])
    (first, *_) = shared_engine.generate(requests, SamplingParams(1.0, 1.0, 40, stop_token_ids=(whole[2],)))
    assert ids(first) == whole[: whole.index(whole[2]) + 1]
    assert first.finish_reason == "stop"


def test_special_tokens_have_text(model_folder):
    assert decoder(str(model_folder), False)([END]) == "<eos>"
