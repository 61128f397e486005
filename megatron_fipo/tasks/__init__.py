"""What a run trains on: problems and their rewards.

    task.py             Problem, Completion, Score, Reward: what a task is made of, and what a reward function is given
    environment.py      Environment, Episode, Done: what answers the policy between turns
    registry.py         data sources by name, and the problems of a run with their settings
    dataset.py          the order in which training takes the problems of a set
    mixture.py          that of several sets, in proportion to their weights
    prompt_encoder.py   a prompt to text and token ids
    chat_template.py    the names that a chat template reads
    prompt_file.py      problems from rows
    supervised_rows.py  prompts with responses to imitate, from rows
    located_rows.py     the rows of a set with their places
    row_files.py        the files of a set: shards, folders, patterns
    row_reader.py       a file (parquet, JSON lines, Arrow) as a stream of rows
    arrow_types.py      which of its columns have values of JSON
    row_function.py     rows from a function of the user's
    row.py              one row as a prompt with its answer
    row_notes.py        what a user should know of the rows of a set
    strict_json.py      JSON that refuses a key twice
    published/          the paper's data sets, for the command `data`
    rewards.py          rewards by name or import path, and sums of them
    response_text.py    token ids of a response to text, or to the end that a reward reads
    named_numbers.py    numbers of a score that become metrics
    dapo_math.py, math_verify.py, exact.py, choice.py    the rewards of these names
    code/               the reward `code`: unit tests, and the sandbox in which answers run
    http/               the reward `http`: a server of the user scores
    countdown/          the built-in demo task, complete: problems, traces, tokenizer, reward function

A task outside this package is a module with a reward function: `reward.name=my_module:score` (docs/rewards.md). To add one
here, write its reward function, and a data source if its problems are not read from a file, and add them to `rewards.py` and
`registry.py`.
"""

from megatron_fipo.tasks.environment import Done, Environment, Episode, Observation
from megatron_fipo.tasks.task import (
    NO_ANSWER,
    Completion,
    Problem,
    Reward,
    Score,
    Turn,
    UnavailableError,
)

__all__ = [
    "NO_ANSWER",
    "Completion",
    "Done",
    "Environment",
    "Episode",
    "Observation",
    "Problem",
    "Reward",
    "Score",
    "Turn",
    "UnavailableError",
]
