"""The streams of supervised training: seeded epochs of complete rows, and traces that stay as they were."""

import hashlib
from itertools import islice

import pytest

from megatron_fipo.config import SftConfig, load_config
from megatron_fipo.driver.sft import _take
from megatron_fipo.driver.sft_data import countdown_traces, supervised_data
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from tests.tasks.files import write

ROWS = [{"prompt": f"{a}+{b}", "response": str(a + b)} for a in range(1, 10) for b in range(1, 5)]


def config(*overrides):
    return load_config(None, ["model_config_path=m", "output_dir=o", *overrides], SftConfig)


def data(*overrides):
    tokenizer = build_tokenizer()
    return supervised_data(config(*overrides), tokenizer, frozenset({tokenizer.eos_token_id}), lambda _: None)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.jsonl", ROWS)


def names(stream, count):
    return [trajectory.group_id for trajectory in islice(stream, count)]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(path):
    arguments = ("data.source=jsonl", f"data.path={path}", "data.max_length=20")
    first, second = (names(data(*arguments).training, 2 * len(ROWS)) for _ in range(2))
    assert first == second
    epochs = first[: len(ROWS)], first[len(ROWS) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(str(n) for n in range(1, len(ROWS) + 1))
    assert epochs[0] != epochs[1]
    assert names(data(*arguments, "seed=2").training, len(ROWS)) != epochs[0]


def test_only_the_response_is_a_label(path):
    trajectory = next(data("data.source=jsonl", f"data.path={path}", "data.max_length=20").training)
    tokenizer = build_tokenizer()
    row = ROWS[int(trajectory.group_id) - 1]
    assert tokenizer.decode(trajectory.prompt_ids) == row["prompt"]
    assert trajectory.response_ids.tolist() == [
        *tokenizer(row["response"])["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert trajectory.response_mask.tolist() == [1] * len(trajectory.response_ids)


def test_held_out_rows_are_never_trained_on_and_those_of_a_file_are_compared(path, tmp_path):
    arguments = ("data.source=jsonl", f"data.path={path}", "data.max_length=20")
    shared = data(*arguments, "data.held_out_share=0.25")
    held_out = {trajectory.group_id for trajectory in shared.held_out}
    assert len(held_out) == 9
    assert not held_out & set(names(shared.training, 3 * len(ROWS)))
    logged = []
    other = write(tmp_path / "b.jsonl", [*ROWS[:2], {"prompt": "9-9", "response": "0"}])
    tokenizer = build_tokenizer()
    read = supervised_data(
        config(*arguments, f"data.held_out_path={other}"),
        tokenizer,
        frozenset({tokenizer.eos_token_id}),
        logged.append,
    )
    assert len(read.held_out) == 3
    assert f"2 of 3 rows of {other} have a prompt that is also trained on" in logged


def test_an_argument_that_the_chat_template_does_not_read_is_refused(path):
    with pytest.raises(UserError, match=r"data\.chat_template_arguments"):
        data(
            "data.source=jsonl",
            f"data.path={path}",
            "data.max_length=20",
            "data.chat_template_arguments={a: 1}",
        )


def test_steps_take_complete_rows_in_order(path):
    arguments = ("data.source=jsonl", f"data.path={path}", "data.max_length=20")
    stream, again = data(*arguments).training, data(*arguments).training
    steps = [_take(stream, 30) for _ in range(3)]
    for step in steps:
        lengths = [trajectory.length for trajectory in step]
        assert sum(lengths) >= 30 > sum(lengths[:-1])
    taken = [trajectory.group_id for step in steps for trajectory in step]
    assert taken == names(again, len(taken))


def test_the_traces_of_countdown_are_those_that_made_the_bundled_model():
    """Pins problems, order, traces and tokens of the seed of examples/countdown/sft.yaml."""
    joint = hashlib.sha256()
    for trajectory in islice(countdown_traces(config(), build_tokenizer()), 200):
        joint.update(trajectory.prompt_ids.tobytes() + trajectory.response_ids.tobytes())
    assert joint.hexdigest() == EXPECTED


EXPECTED = "8bc3542e456098228e168fa638b0a8358e2dfcb512e817270e90654b76d8c91b"
