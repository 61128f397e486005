"""Datasets by the name that `data.source` uses. A new source is a function with the signature of `Source` and a line here."""

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config import DataConfig
from megatron_fipo.data.countdown import generate_problems
from megatron_fipo.data.dataset import Dataset
from megatron_fipo.data.problem import Problem
from megatron_fipo.data.rows import PromptEncoder, read_problems
from megatron_fipo.errors import UserError


class Source(Protocol):
    """The problems of one split: those for training, or the held-out ones."""

    def __call__(self, config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int) -> list[Problem]: ...


def _from_file(config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int) -> list[Problem]:
    path = config.evaluation_path if held_out else config.train_path
    if path is None and held_out:
        return []
    if path is None:
        raise UserError(f"data.source is {config.source} but data.train_path is not set; give the file")
    return read_problems(Path(path), config.source, encode, config.deduplicate)


def _countdown(config: DataConfig, encode: PromptEncoder, *, held_out: bool, seed: int) -> list[Problem]:
    problems = []
    for problem in generate_problems(config.evaluation_size if held_out else config.train_size, held_out=held_out, seed=seed):
        text, prompt_ids = encode(f"countdown problem {problem}", problem.prompt)
        problems.append(Problem(str(problem), prompt_ids, text, ground_truth=str(problem), data_source="countdown"))
    return problems


SOURCES: dict[str, Source] = {"parquet": _from_file, "jsonl": _from_file, "countdown": _countdown}


def load_datasets(
    config: DataConfig, max_prompt_length: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Dataset, list[Problem]]:
    """The training set in its seeded order, and the held-out problems (none without `data.evaluation_path`).

    Raises UserError for an unknown source, a file or row that can't be used, or a tokenizer without an end-of-sequence token.
    """
    train = _load(config, max_prompt_length, tokenizer, seed, held_out=False)
    return Dataset(train, seed), load_evaluation(config, max_prompt_length, tokenizer, seed)


def load_evaluation(config: DataConfig, max_prompt_length: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Problem]:
    """The held-out problems alone, for evaluating without training data."""
    return _load(config, max_prompt_length, tokenizer, seed, held_out=True)


def _load(
    config: DataConfig, max_prompt_length: int, tokenizer: PreTrainedTokenizerBase, seed: int, *, held_out: bool
) -> list[Problem]:
    if config.source not in SOURCES:
        raise UserError(f"data.source is {config.source!r}; choose one of {', '.join(SOURCES)}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no response could end; set eos_token in its config")
    return SOURCES[config.source](config, PromptEncoder(tokenizer, max_prompt_length), held_out=held_out, seed=seed)
