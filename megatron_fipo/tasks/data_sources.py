"""Datasets by the name that `data.source` uses. A new source is a function with the signature of `Source` and a line here."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.problems import generate_problems
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.problem import Problem
from megatron_fipo.tasks.prompt_file import PromptEncoder, read_problems

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


class Source(Protocol):
    """The problems of one split: those for training, or the held-out ones. `say` is told what was left out."""

    def __call__(
        self, config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int, say: Say
    ) -> list[Problem]: ...


def _from_file(
    config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int, say: Say
) -> list[Problem]:
    path = config.evaluation_path if held_out else config.train_path
    if path is None and held_out:
        return []
    if path is None:
        raise UserError(f"data.source is {config.source} but data.train_path is not set; give the file")
    return read_problems(Path(path), config.source, encode, config.deduplicate, say)


def _countdown(
    config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int, say: Say
) -> list[Problem]:
    problems = []
    for problem in generate_problems(
        config.evaluation_size if held_out else config.train_size, held_out=held_out, seed=seed
    ):
        text, prompt_ids = encode(f"countdown problem {problem}", problem.prompt)
        problems.append(
            Problem(str(problem), prompt_ids, text, ground_truth=str(problem), data_source="countdown")
        )
    return problems


SOURCES: dict[str, Source] = {"parquet": _from_file, "jsonl": _from_file, "countdown": _countdown}


def load_datasets(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Say = logger.info,
) -> tuple[Dataset, list[Problem]]:
    """The training set in its seeded order, and the held-out problems (none without `data.evaluation_path`).

    `say` receives one sentence for each file of which rows were left out as repetitions.
    Raises UserError for an unknown source, a file or row that can't be used, or a tokenizer without an end-of-sequence token.
    """
    train = _load(config, max_prompt_length, tokenizer, seed, say, held_out=False)
    return Dataset(train, seed), load_evaluation(config, max_prompt_length, tokenizer, seed, say)


def load_evaluation(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Say = logger.info,
) -> list[Problem]:
    """The held-out problems alone, for evaluating without training data. `say` as in `load_datasets`."""
    return _load(config, max_prompt_length, tokenizer, seed, say, held_out=True)


def _load(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    say: Say,
    *,
    held_out: bool,
) -> list[Problem]:
    if config.source not in SOURCES:
        raise UserError(f"data.source is {config.source!r}; choose one of {', '.join(SOURCES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no response could end; set eos_token in its config"
        )
    encode = PromptEncoder(tokenizer, max_prompt_length)
    return SOURCES[config.source](config, encode, held_out=held_out, seed=seed, say=say)
