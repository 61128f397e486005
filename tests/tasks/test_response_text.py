"""The end of a response, decoded from its last tokens, is the end of its complete text, for every kind of decoder."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.config import RewardConfig
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.tasks.rewards import REWARDS
from megatron_fipo.tasks.task import Problem
from tests.completions import scored

TEXT = "the answer is 34, naïve café 数学の答え 🙂🙃 don't 'a' . ! "


def byte_level() -> Any:
    """As Qwen's and Llama 3's: tokens are bytes, so a character may be in several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def byte_fallback(clean: bool = False) -> Any:
    """As Llama 2's: a space is a character of a token, and a run of byte tokens is decoded as one."""
    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁the", "the", "▁▁", ".", "▁'", "'", "é", "数", "▁34"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=clean,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=clean,
    )


def word_pieces() -> Any:
    tokens = ["[UNK]", "[SEP]", "the", "##ing", "answer", "##s", "'", ".", "é", "##数"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="[SEP]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "cleans_up": lambda: byte_fallback(clean=True),
    "word_pieces": word_pieces,
    "countdown": build_tokenizer,
}


@cache
def tokenizer(name: str) -> Any:
    return TOKENIZERS[name]()


@st.composite
def responses(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A tokenizer, and token ids: any, or runs of the same few, such as the bytes of a character over and over."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    any_id = st.integers(0, len(tokenizer(name)) - 1)
    runs = st.tuples(st.lists(any_id, min_size=1, max_size=5), st.integers(1, 40))
    parts = draw(st.lists(runs, max_size=8))
    return name, [token for tokens, times in parts for token in tokens * times]


def bytes_of(text: str) -> list[int]:
    """Ids of the byte tokens of `byte_fallback`."""
    return [2 + byte for byte in text.encode()]


@settings(deadline=None, max_examples=400)
@given(responses(), st.integers(1, 60))
@example(("byte_fallback", [3, *bytes_of("🙂" * 60)]), 12)
@example(("byte_fallback", [0x41 + 2, 0xFF + 2, *bytes_of("A" * 90)]), 12)
@example(("byte_fallback", [*bytes_of("é")[:1], 1, *bytes_of("é" * 80)[1:]]), 9)
@example(("cleans_up", [259, *[263] * 70]), 7)
@example(("cleans_up", [259, *[263] * 71]), 7)
@example(("byte_level", byte_level().encode("🙂" * 90)), 10)
def test_the_end_is_that_of_the_complete_text(response, characters):
    name, ids = response
    text = ResponseText(tokenizer(name))
    assert text.ending(ids, characters) == text(ids)[-characters:]


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("a 数🙂é'."), min_size=0, max_size=200), st.integers(1, 60))
def test_characters_of_several_tokens_are_complete_in_the_end(text, characters):
    decode = ResponseText(tokenizer("byte_level"))
    ids = tokenizer("byte_level").encode(text)
    assert decode.ending(ids, characters) == text[-characters:]


class CountingTokens:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.decoded = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self.inner.decode(ids, **options)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "countdown"])
def test_a_long_response_is_not_decoded_for_its_end(name):
    counting = CountingTokens(tokenizer(name))
    ids = [260] * 20_000 if name != "countdown" else [5] * 20_000
    ResponseText(counting).ending(ids, 300)
    assert counting.decoded < 2_000


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("Answer: 34\n$x "), max_size=700))
def test_the_rewards_read_no_more_than_they_state(text):
    problem = Problem("p", (1,), "", "34", "math")
    reward = REWARDS["dapo_math"](RewardConfig())
    end = text[-(reward.reads_last or 0) :]
    assert scored(reward.score, end, problem) == scored(reward.score, text, problem)
    assert REWARDS["countdown"](RewardConfig()).reads_last is None
