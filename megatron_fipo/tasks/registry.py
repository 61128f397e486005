"""Data sources and rewards by the names that `data.source` and `reward.name` use.

A new task is a `DataSource`, or a `RewardFunction` with the check of its answers, and a line here.
"""

import logging
from datetime import datetime
from typing import TYPE_CHECKING

from megatron_fipo.config import Config
from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.problems import countdown_problems
from megatron_fipo.tasks.countdown.scorer import countdown_obstacle, score_countdown
from megatron_fipo.tasks.dapo_math import (
    SEARCHED_CHARACTERS,
    dapo_math_doubt,
    dapo_math_obstacle,
    score_dapo_math,
)
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import file_problems
from megatron_fipo.tasks.task import DataSource, Log, Problem, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA_SOURCES: dict[str, DataSource] = {
    "parquet": file_problems,
    "jsonl": file_problems,
    "countdown": countdown_problems,
}
REWARDS: dict[str, Reward] = {
    "countdown": Reward(score_countdown, countdown_obstacle),
    "dapo_math": Reward(score_dapo_math, dapo_math_obstacle, dapo_math_doubt, SEARCHED_CHARACTERS),
}

logger = logging.getLogger(__name__)


def reward(name: str) -> Reward:
    """The reward called `name`. Raises `UserError` with the known names if there is none."""
    if name not in REWARDS:
        raise UserError(f"reward.name is {name!r}; choose one of {', '.join(sorted(REWARDS))}")
    return REWARDS[name]


def load_datasets(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime, log: Log = logger.info
) -> tuple[Dataset, list[Problem]]:
    """The training set in its seeded order, and the held-out problems (none without `data.evaluation_path`).

    `now` is the time that chat templates may print. `log` receives what a user should know of the files, such
    as the number of duplicate prompts. Raises `UserError` for an unknown source, an unusable file or row, an
    answer that the reward cannot compare with, or a tokenizer without an end-of-sequence token.
    """
    train = _load(config, tokenizer, now, log, held_out=False)
    held_out = load_evaluation(config, tokenizer, now, log)
    trained = {problem.prompt_text for problem in train}
    shared = sum(problem.prompt_text in trained for problem in held_out)
    if shared:
        log(f"{shared:,} of {len(held_out):,} held-out problems are also trained on")
    return Dataset(train, config.seed), held_out


def load_evaluation(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime, log: Log = logger.info
) -> list[Problem]:
    """The held-out problems, to evaluate without training data. Arguments and errors as in `load_datasets`."""
    return _load(config, tokenizer, now, log, held_out=True)


def _load(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime, log: Log, *, held_out: bool
) -> list[Problem]:
    data = config.data
    if data.source not in DATA_SOURCES:
        raise UserError(f"data.source is {data.source!r}; choose one of {', '.join(DATA_SOURCES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no response could end; "
            "set eos_token in its config"
        )
    encode = PromptEncoder(tokenizer, config.rollout.max_prompt_length, now)
    problems = DATA_SOURCES[data.source](data, encode, held_out=held_out, seed=config.seed, log=log)
    path = data.evaluation_path if held_out else data.train_path
    _check_answers(config.reward.name, path or data.source, problems, log)
    return problems


def _check_answers(name: str, source: str, problems: list[Problem], log: Log) -> None:
    """Raise `UserError` if the reward finds no response right for some problem, whatever the model answers.

    Reports answers that a right response would probably write differently.
    """
    chosen = reward(name)
    unusable = [
        (problem, why) for problem in problems if (why := chosen.obstacle(problem.ground_truth)) is not None
    ]
    if unusable:
        problem, why = unusable[0]
        number = (
            f"{len(unusable):,} of {len(problems):,} answers cannot"
            if len(unusable) > 1
            else "an answer cannot"
        )
        raise UserError(
            f"{source}: {number} be scored by reward.name={name}: the ground truth {problem.ground_truth!r:.60} of "
            f"problem {problem.problem_id} {why}"
        )
    doubts: dict[str, list[Problem]] = {}
    for problem in problems:
        if (doubt := chosen.doubt(problem.ground_truth)) is not None:
            doubts.setdefault(doubt, []).append(problem)
    for doubt, found in doubts.items():
        log(
            f"{source}: {len(found):,} of {len(problems):,} answers have {doubt}, as {found[0].ground_truth!r:.60} of "
            f"problem {found[0].problem_id}; reward.name={name} compares text, so check that responses are written so"
        )
