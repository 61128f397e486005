"""Observations as token ids, with real chat templates."""

import pytest

from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.environments.observation import ObservationEncoder
from megatron_fipo.scorer.result import UnusableResultError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from tests.scorer.faulty import ROOT

TEMPLATE = "{% for m in messages %}({{ m.role[0] }}:{{ m.content }})={% endfor %}{% if add_generation_prompt %}(a:{% endif %}"
"""The end of a turn is `)`; roles are unknown characters, which do not matter here."""


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer()
    made.chat_template = TEMPLATE
    return made


def texts(tokenizer, ids) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


MESSAGES = [{"role": "user", "content": "12345"}, {"role": "tool", "content": "6"}]


def test_messages_are_what_the_template_adds_after_the_assistant(tokenizer):
    encode = ObservationEncoder(tokenizer, 32, 100)
    end = tokenizer.convert_tokens_to_ids(")")
    after = "=(<unk>:12345)=(<unk>:6)=(<unk>:"
    assert texts(tokenizer, encode(MESSAGES, end)[0]) == after, "the turn ended by itself"
    assert texts(tokenizer, encode(MESSAGES, 3)[0]) == ")" + after, "a stop string ended it"


def test_a_conversation_is_the_same_in_one_piece_and_by_turns(tokenizer):
    """The tokens of prompt, turn, observation and turn are those of the complete conversation."""
    before = [{"role": "user", "content": "1"}]
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    complete = tokenizer.apply_chat_template(
        [*before, {"role": "assistant", "content": "2"}, *MESSAGES, {"role": "assistant", "content": "3"}],
        tokenize=False,
    )
    ids = tokenizer(prompt + "2)")["input_ids"]
    ids += ObservationEncoder(tokenizer, 32, 100)(MESSAGES, ids[-1])[0].tolist()
    ids += tokenizer("3)=")["input_ids"]
    assert ids == tokenizer(complete)["input_ids"]


@pytest.mark.parametrize("limit", range(15, 24))
def test_the_longest_content_is_cut_and_the_template_stays(tokenizer, limit):
    ids, truncated = ObservationEncoder(tokenizer, 32, limit)(MESSAGES, None)
    text = texts(tokenizer, ids)
    assert len(ids) <= limit
    assert truncated == (limit < 21)
    assert text.startswith(")=(<unk>:1") == (limit >= 17)
    assert text.endswith("=(<unk>:")


def test_a_template_longer_than_the_limit_is_refused(tokenizer):
    with pytest.raises(
        UnusableResultError, match=r"15 tokens without content, more than environment\.max_observation"
    ):
        ObservationEncoder(tokenizer, 32, 14)(MESSAGES, None)


def test_a_text_is_encoded_as_it_is_without_special_tokens():
    tokenizer = checked_tokenizer(str(ROOT / "examples/countdown/base-model"), False)
    ids, truncated = ObservationEncoder(tokenizer, 32, 5)("12;<eos>", None)
    assert (texts(tokenizer, ids), truncated) == ("12;<eos>", False)
    ids, truncated = ObservationEncoder(tokenizer, 32, 5)("123456", None)
    assert (texts(tokenizer, ids), truncated) == ("12345", True)
