"""The command `check-task`: prompts as the model gets them, and scores of responses, without engines or training."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fipo.cli.arguments import Subparsers, add_command, add_overrides, path, positive
from megatron_fipo.cli.streams import say

if TYPE_CHECKING:
    from megatron_fipo.cli.task_page import ProblemSet, Shown
    from megatron_fipo.config import Config
    from megatron_fipo.scorer.child import ScorerChild
    from megatron_fipo.tasks.task import Score


def add_check_task(commands: Subparsers) -> None:
    summary = "show the prompts of a task and score responses, without training"
    command = add_command(commands, "check-task", summary, CHECK_TASK_HELP)
    command.add_argument("config", metavar="CONFIG", help="YAML file as for train")
    add_overrides(command, "reward.name=my_task:score data.train_path=train.jsonl")
    command.add_argument(
        "--responses",
        metavar="FILE",
        type=path,
        help="responses to score, as JSON lines with problem_id or row, and response (default: made-up ones)",
    )
    command.add_argument(
        "--rows", metavar="N", type=positive, default=2, help="rows to show of each set (default: 2)"
    )
    command.set_defaults(handler=run_check_task)


CHECK_TASK_HELP = """\
    Load the task of a configuration, show the first prompts of each set as the model gets them, and score
    responses by the configured reward, in a process with its limits of time and memory. Needs the folder
    of the model for its tokenizer, and no GPU.

    Without --responses each problem shown gets two made-up responses: the ground truth as `Answer: ...`, and
    one without an answer. A line of FILE is {"problem_id": "q1", "response": "..."} or {"row": 1, ...};
    "set": "evaluation NAME" chooses the set.

    A failure of the reward function is shown with its traceback and its row; the exit code is then 2.

    examples:
      megatron-fipo check-task mine.yaml
      megatron-fipo check-task mine.yaml reward.name=my_task:score --responses responses.jsonl
"""


def run_check_task(arguments: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate
    from megatron_fipo.environment import HUB_OFFLINE

    config = load_config(arguments.config, arguments.overrides, note=say)
    validate(config)
    os.environ.setdefault(HUB_OFFLINE, "1")  # read when huggingface_hub is imported
    from megatron_fipo.cli import task_page
    from megatron_fipo.exit_codes import DONE, USER_ERROR
    from megatron_fipo.scorer.child import ScorerChild
    from megatron_fipo.scorer.protocol import ScorerSettings
    from megatron_fipo.tasks.registry import rewards_of

    sets, tokenizer = _load(config)
    for each in sets:
        print("\n".join(each.lines()))
    if arguments.responses is None:
        shown = task_page.first_rows(sets, arguments.rows)
    else:
        shown = task_page.given_responses(_lines(arguments.responses), str(arguments.responses), sets)
    rewards = rewards_of(*(each.problems for each in sets))
    scores: list[Score] = []
    responses = 0
    with ScorerChild(ScorerSettings.of(config, config.model.path, rewards)) as scorer:
        for row in shown:
            print("", *row.lines(), sep="\n")
            responses += len(row.responses)
            scores += _score(row, scorer, tokenizer, config)
    print("", *task_page.summary(scores, responses - len(scores)), sep="\n")
    return DONE if len(scores) == responses else USER_ERROR


def _load(config: "Config") -> tuple[list["ProblemSet"], Any]:
    """The sets of the task, and the tokenizer."""
    from datetime import datetime

    from megatron_fipo.cli.task_page import problem_sets
    from megatron_fipo.driver.tokenizer import checked_tokenizer
    from megatron_fipo.environments.load import load_environment
    from megatron_fipo.tasks.registry import environments_of, load_datasets

    tokenizer = checked_tokenizer(config.model.path, config.model.trust_remote_code)
    train, held_out = load_datasets(config, tokenizer, datetime.now(), say)
    for name in sorted(environments_of(train.problems, *held_out.values())):
        load_environment(name, os.getcwd())
        say(f"the environment {name} can be loaded; it is tried when a run starts, not here")
    return problem_sets(train.problems, held_out), tokenizer


def _lines(file: Path) -> Sequence[str]:
    from megatron_fipo.errors import UserError

    try:
        return file.read_text(encoding="utf-8").split("\n")  # JSON text may have other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--responses {file} cannot be read ({error}); give a file of JSON lines") from None


def _score(row: "Shown", scorer: "ScorerChild", tokenizer: Any, config: "Config") -> "Iterator[Score]":
    """Score the responses of a problem, print the results, and give the scores.

    One request for each response, so that a failure costs no other; a reward of groups gets all at once.
    """
    import numpy as np

    from megatron_fipo.cli.task_page import failure_lines, response_lines, score_lines
    from megatron_fipo.scorer.protocol import Failure, FinishedResponse, ScoreRequest
    from megatron_fipo.tasks.rewards import load_terms

    problem = row.problem
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in row.responses]
    finished = [FinishedResponse(np.array(ids, np.int32), "stop") for ids in encoded]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
    terms = load_terms(problem.task.reward, os.getcwd(), config.reward)
    at_once = len(finished) if any(term.reward.score_group for term in terms) else 1
    for first in range(0, len(finished), at_once):
        part = range(first, first + at_once)
        answer = scorer.score(ScoreRequest(0, problem, tuple(finished[index] for index in part)))
        for position, index in enumerate(part):
            print(*response_lines(index + 1, texts[index]), sep="\n")
            if texts[index] != row.responses[index]:
                print(
                    "    the tokenizer of the model cannot write the given text; this is what it makes of it"
                )
            if not isinstance(answer.result, Failure):
                score = answer.result[position]
                print(*score_lines(score, answer.seconds / at_once), sep="\n")
                yield score
        if isinstance(answer.result, Failure):
            print(*failure_lines(answer.result), sep="\n")
