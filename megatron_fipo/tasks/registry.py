"""Data sources by the names that `data.source` uses, and the problems of a run: read, checked, with their settings."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from megatron_fipo.config import FILE_SOURCES, Config, EvaluationSet, TrainingSet
from megatron_fipo.config.reward_keys import reward_keys
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import is_import_path
from megatron_fipo.tasks.chat_template import check_template_arguments
from megatron_fipo.tasks.countdown.problems import COUNTDOWN
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.environment import SINGLE_TURN
from megatron_fipo.tasks.mixture import Mixture
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import read_problems, row_settings
from megatron_fipo.tasks.rewards import Term, load_terms
from megatron_fipo.tasks.task import DataSource, HeldOut, Log, Problem, TaskSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATORS: dict[str, DataSource] = {"countdown": COUNTDOWN}
"""Data sources that generate their problems, by the names that `data.source` uses."""

logger = logging.getLogger(__name__)


def load_datasets(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime, log: Log = logger.info
) -> tuple[Dataset | Mixture, HeldOut]:
    """The training problems in their seeded order, and the evaluation sets.

    `now` is the time that chat templates may print. `log` receives what a user should know of the files, such
    as the number of duplicate prompts. Raises `UserError` for an unknown source, an unusable file or row, an
    answer that the reward cannot compare with, or a tokenizer without an end-of-sequence token.
    """
    encode = _encoder(config, tokenizer, now)
    sets = config.data.sets
    train = _training(config, encode, log)
    held_out = load_evaluation(config, tokenizer, now, log)
    trained = {problem.prompt_text for problems in train.values() for problem in problems}
    for name, problems in held_out.items():
        if shared := sum(problem.prompt_text in trained for problem in problems):
            log(f"{shared:,} of {len(problems):,} problems of the evaluation set {name} are also trained on")
    if not sets:
        return Dataset(train[""], config.seed), held_out
    return Mixture(train, {name: entry.weight for name, entry in sets.items()}, config.seed), held_out


def load_evaluation(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime, log: Log = logger.info
) -> HeldOut:
    """The evaluation sets, without training data. Arguments and errors as in `load_datasets`."""
    encode = _encoder(config, tokenizer, now)
    if config.data.source in GENERATORS:
        sets = GENERATORS[config.data.source].held_out(config, encode, log)
        return {name: _checked(problems, config, None, name, name, log) for name, problems in sets.items()}
    return {
        name: _rows_of(config, encode, entry, name, log) for name, entry in config.evaluation.sets.items()
    }


def _training(config: Config, encode: PromptEncoder, log: Log) -> dict[str, list[Problem]]:
    """The training problems by set, with unique ids over all sets; the name is empty without `data.sets`."""
    data = config.data
    if data.source in GENERATORS:
        problems = GENERATORS[data.source].training(config, encode, log)
        return {"": _checked(problems, config, None, "", data.source, log)}
    if not data.sets:
        if data.train_path is None and not is_import_path(data.source):
            raise UserError(
                f"data.source is {data.source} but neither data.train_path nor data.sets is set; give the file"
            )
        return {"": _rows_of(config, encode, None, "", log)}
    return {
        name: [
            replace(problem, problem_id=f"{name}/{problem.problem_id}")
            for problem in _rows_of(config, encode, entry, name, log)
        ]
        for name, entry in data.sets.items()
    }


def _rows_of(
    config: Config, encode: PromptEncoder, of_set: TrainingSet | EvaluationSet | None, name: str, log: Log
) -> list[Problem]:
    """The problems of a set that consists of rows."""
    rewards = {(of_set and of_set.reward) or config.reward.name, *config.reward.by_data_source.values()}
    terms = [term for sums in _terms(config, sorted(rewards)).values() for term in sums]
    reads_columns = _environment_of(config, of_set) or any(term.reward.reads_columns for term in terms)
    settings = row_settings(config, of_set, keep_columns=bool(reads_columns))
    return _checked(read_problems(settings, encode, log), config, of_set, name, settings.title, log)


def rewards_of(*sets: Iterable[Problem]) -> tuple[str, ...]:
    """The rewards of the problems, each once, as `reward.name` writes them."""
    return tuple(sorted({problem.task.reward for problems in sets for problem in problems}))


def environments_of(*sets: Iterable[Problem]) -> dict[str, Problem]:
    """The environments of the problems by import path, each with its first problem."""
    found: dict[str, Problem] = {}
    for problem in (problem for problems in sets for problem in problems):
        if problem.task.environment:
            found.setdefault(problem.task.environment, problem)
    return found


def _encoder(config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime) -> PromptEncoder:
    data = config.data
    if data.source not in (*GENERATORS, *FILE_SOURCES) and not is_import_path(data.source):
        raise UserError(
            f"data.source is {data.source!r}; choose one of {', '.join((*FILE_SOURCES, *GENERATORS))}, or an import path"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no response could end; "
            "set eos_token in its config"
        )
    check_template_arguments(tokenizer, data.chat_template_arguments)
    return PromptEncoder(
        tokenizer,
        config.rollout.max_prompt_length,
        now,
        data.system_prompt,
        data.text_prompts == "user_message",
        data.chat_template_arguments,
    )


def _checked(
    problems: Sequence[Problem],
    config: Config,
    of_set: TrainingSet | EvaluationSet | None,
    name: str,
    title: str,
    log: Log,
) -> list[Problem]:
    """The problems of the set `name` with their settings, after a check of their answers; `title` names it in messages."""
    with_settings = [_with_settings(problem, config, of_set, name) for problem in problems]
    _check_answers(config, title, with_settings, log)
    return with_settings


def _with_settings(
    problem: Problem, config: Config, settings: TrainingSet | EvaluationSet | None, set_name: str
) -> Problem:
    """The problem with the settings of its set, and of its `data_source`, which comes first."""
    reward = config.reward.by_data_source.get(problem.data_source)
    limit = None if settings is None else settings.max_response_length
    task = TaskSettings(
        set_name=set_name,
        reward=reward or (settings and settings.reward) or config.reward.name,
        max_response_length=limit or config.rollout.max_response_length,
        environment=_environment_of(config, settings),
    )
    return replace(problem, task=task)


def _environment_of(config: Config, of_set: TrainingSet | EvaluationSet | None) -> str:
    """The environment of the problems of a set; empty for a single turn."""
    name = (of_set and of_set.environment) or config.environment.name or SINGLE_TURN
    return "" if name == SINGLE_TURN else name


def _terms(config: Config, rewards: Iterable[str]) -> dict[str, tuple[Term, ...]]:
    """The terms of each of these rewards, as `reward.name` writes them."""
    keys = reward_keys(config)
    return {text: load_terms(text, os.getcwd(), config.reward, keys[text]) for text in rewards}


def _check_answers(config: Config, source: str, problems: Sequence[Problem], log: Log) -> None:
    """Raise `UserError` if the reward finds no response right for some problem, whatever the model answers.

    Reports answers that a right response would probably write differently.
    """
    terms = _terms(config, rewards_of(problems))
    unusable = []
    doubts: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        for term in terms[problem.task.reward]:
            if (why := term.reward.obstacle(problem)) is not None:
                unusable.append((problem, term.name, why))
            if (doubt := term.reward.doubt(problem)) is not None:
                doubts.setdefault((term.name, doubt), []).append(problem)
    if unusable:
        problem, name, why = unusable[0]
        number = (
            f"{len(unusable):,} of {len(problems):,} answers cannot"
            if len(unusable) > 1
            else "an answer cannot"
        )
        raise UserError(
            f"{source}: {number} be scored by the reward {name}: the ground truth {problem.ground_truth!r:.60} of "
            f"problem {problem.problem_id} {why}"
        )
    for (name, doubt), found in doubts.items():
        log(
            f"{source}: {len(found):,} of {len(problems):,} answers have {doubt}, as {found[0].ground_truth!r:.60} of "
            f"problem {found[0].problem_id}; the reward {name} compares text, so check that responses are written so"
        )
