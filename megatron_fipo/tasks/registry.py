"""Data sources and scorers by the names that `data.source` and `reward.name` use.

A new task is a function with the signature of `DataSource` or `Scorer` and a line here.
"""

import logging
from typing import TYPE_CHECKING

from megatron_fipo.config import DataConfig
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.problems import countdown_problems
from megatron_fipo.tasks.countdown.scorer import score_countdown
from megatron_fipo.tasks.dapo_math import score_dapo_math
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import file_problems
from megatron_fipo.tasks.task import DataSource, Log, Problem, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA_SOURCES: dict[str, DataSource] = {
    "parquet": file_problems,
    "jsonl": file_problems,
    "countdown": countdown_problems,
}
SCORERS: dict[str, Scorer] = {
    "countdown": score_countdown,
    "dapo_math": score_dapo_math,
}

logger = logging.getLogger(__name__)


def scorer(name: str) -> Scorer:
    """The scorer called `name`. Raises `UserError` with the known names if there is none."""
    if name not in SCORERS:
        raise UserError(f"reward.name is {name!r}; choose one of {', '.join(sorted(SCORERS))}")
    return SCORERS[name]


def load_datasets(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    log: Log = logger.info,
) -> tuple[Dataset, list[Problem]]:
    """The training set in its seeded order, and the held-out problems (none without `data.evaluation_path`).

    `log` receives one sentence for each file with duplicate prompts, with the number of rows dropped. Raises
    `UserError` for an unknown source, an unusable file or row, or a tokenizer without an end-of-sequence
    token.
    """
    train = _load(config, max_prompt_length, tokenizer, seed, log, held_out=False)
    return Dataset(train, seed), load_evaluation(config, max_prompt_length, tokenizer, seed, log)


def load_evaluation(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    log: Log = logger.info,
) -> list[Problem]:
    """The held-out problems, to evaluate without training data. `log` and errors as in `load_datasets`."""
    return _load(config, max_prompt_length, tokenizer, seed, log, held_out=True)


def _load(
    config: DataConfig,
    max_prompt_length: int,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    log: Log,
    *,
    held_out: bool,
) -> list[Problem]:
    if config.source not in DATA_SOURCES:
        raise UserError(f"data.source is {config.source!r}; choose one of {', '.join(DATA_SOURCES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no response could end; "
            "set eos_token in its config"
        )
    encode = PromptEncoder(tokenizer, max_prompt_length)
    return DATA_SOURCES[config.source](config, encode, held_out=held_out, seed=seed, log=log)
