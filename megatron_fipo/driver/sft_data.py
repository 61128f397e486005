"""What supervised training imitates, as endless streams of trajectories: rows in seeded epochs, or generated traces."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import SftConfig
from megatron_fipo.tasks.chat_template import check_template_arguments
from megatron_fipo.tasks.countdown.problems import generate_problems
from megatron_fipo.tasks.countdown.traces import supervised_trace
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.supervised_rows import (
    EncodeResponse,
    Example,
    ResponseColumns,
    SupervisedRows,
    read_examples,
    split_held_out,
)
from megatron_fipo.tasks.task import Log

ANY_LENGTH = 2**31
"""Limit of prompts alone: data.max_length limits the row."""


@dataclass(frozen=True)
class SupervisedData:
    training: Iterator[Trajectory]
    """Endless."""
    held_out: list[Trajectory] = field(default_factory=list)


def supervised_data(config: SftConfig, tokenizer: Any, end_ids: frozenset[int], log: Log) -> SupervisedData:
    """What `config.data` names. `end_ids` are the tokens that end a response. Raises `UserError` as the readers of rows."""
    data = config.data
    if data.source == "countdown":
        return SupervisedData(countdown_traces(config, tokenizer))
    check_template_arguments(tokenizer, data.chat_template_arguments)
    prompt = PromptEncoder(
        tokenizer,
        ANY_LENGTH,
        datetime.now(),
        data.system_prompt,
        data.text_prompts == "user_message",
        data.chat_template_arguments,
    )
    response = EncodeResponse(tokenizer, end_ids)

    def read(path: str | None) -> list[Example]:
        columns = ResponseColumns(**data.columns)
        rows = SupervisedRows(path, data.source, columns, data.max_length, data.overlong_rows == "drop")
        return read_examples(rows, prompt, response, log)

    training, held_out = read(data.path), []
    if data.held_out_path is not None:
        held_out = read(data.held_out_path)
        prompts = {example.prompt_ids for example in training}
        if shared := sum(example.prompt_ids in prompts for example in held_out):
            log(
                f"{shared:,} of {len(held_out):,} rows of {data.held_out_path} have a prompt that is also trained on"
            )
    elif data.held_out_share:
        training, held_out = split_held_out(training, data.held_out_share, config.seed)
    return SupervisedData(_epochs(training, config.seed), [_trajectory(example) for example in held_out])


def _epochs(examples: Sequence[Example], seed: int) -> Iterator[Trajectory]:
    """All rows in an order that depends on the seed and the epoch only, again and again."""
    epoch = 0
    while True:
        for index in sorted(range(len(examples)), key=lambda index: digest("supervised", seed, epoch, index)):
            yield _trajectory(examples[index])
        epoch += 1


def _trajectory(example: Example) -> Trajectory:
    return imitated(example.name, example.prompt_ids, example.response_ids)


def countdown_traces(config: SftConfig, tokenizer: Any) -> Iterator[Trajectory]:
    """An endless stream: the training problems in shuffled epochs, each time with a new trace."""
    data = config.data
    problems = generate_problems(data.train_size, numbers=data.numbers, held_out=False, seed=config.seed)
    rng = random.Random(f"supervised {config.seed}")
    while True:
        rng.shuffle(problems)
        for problem in problems:
            prompt = tokenizer.encode(problem.prompt, add_special_tokens=False)
            response = tokenizer.encode(supervised_trace(problem, rng), add_special_tokens=False)
            yield imitated(str(problem), prompt, [*response, tokenizer.eos_token_id])


def imitated(name: str, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Trajectory:
    """A response to imitate. All of its tokens are trained on, and none of the prompt."""
    length = len(response_ids)
    return Trajectory(
        name,
        np.array(prompt_ids, dtype=np.int32),
        np.array(response_ids, dtype=np.int32),
        np.ones(length, dtype=np.int8),
        np.zeros(length, dtype=np.float32),
        [VersionSpan(0, 0, length)],
        "stop",
    )
