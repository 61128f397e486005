"""The settings of what a run trains on: problems, their rewards, and held-out measurements."""

from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.fields import (
    REQUIRED,
    choice,
    file_path,
    free_values,
    hook,
    hook_sum,
    named_hook_sums,
    named_texts,
    number,
    sections,
)

LEAST_TEMPERATURE = 0.01
"""Of sampling: vLLM raises lower ones to it."""
FILE_SOURCES = ("parquet", "jsonl", "arrow")
"""Data sources that read files; an import path is a function that yields rows, and all others generate their problems."""
DATA_SOURCES = (*FILE_SOURCES, "countdown")
"""Names of `data.source`."""
COLUMN_NAMES = ("prompt", "ground_truth", "data_source", "id")
"""Names of `data.columns`."""
ANSWER_FORMS = ("verbatim", "boxed", "hashes")
"""Names of `data.answer`."""
REWARDS = ("dapo_math", "math_verify", "exact", "choice", "code", "http", "countdown")
"""Names of `reward.name`."""
ENVIRONMENTS = ("single_turn",)
"""Names of `environment.name`."""


@dataclass
class TrainingSet:
    """One file of `data.sets`. An entry of text alone is its path."""

    path: str = file_path(REQUIRED)
    """As data.train_path."""
    weight: float = number(1.0, above=0)
    """Share of the prompts that come from this set, relative to the weights of the others."""
    reward: str | None = hook_sum(None, *REWARDS)
    """As reward.name, for this set; null for reward.name."""
    max_response_length: int | None = number(None, least=1)
    """As rollout.max_response_length, which it cannot exceed; null for that."""
    environment: str | None = hook(None, *ENVIRONMENTS)
    """As environment.name, for this set; null for environment.name."""
    source: str | None = hook(None, *FILE_SOURCES)
    """As data.source, for this set; null for data.source."""
    columns: dict[str, str] = named_texts(*COLUMN_NAMES)
    """As data.columns, for this set; a name that is not given is that of data.columns."""
    answer: str | None = choice(None, *ANSWER_FORMS)
    """As data.answer, for this set; null for data.answer."""


@dataclass
class DataConfig:
    """Problems to train on and held-out problems."""

    source: str = hook("parquet", *DATA_SOURCES[1:])
    """`parquet`, `jsonl` and `arrow` (folders that Hugging Face datasets saved) read one problem per row. An import path,
    `package.module:function`, is a function of the path of a set that yields the rows. `countdown` generates problems."""
    train_path: str | None = file_path(None)
    """Training rows, if there is one set of them: a file, a folder with the shards of one, or a pattern such as
    `data/train-*.parquet`. Held-out files are `evaluation.sets`."""
    sets: dict[str, TrainingSet] = sections()
    """Several sets of training rows by name, instead of train_path: `sets: {math: {path: math.parquet, weight: 2}}`, or
    data.sets.math=FILE; null removes one. Metrics of a set are set/NAME/..."""
    columns: dict[str, str] = named_texts(*COLUMN_NAMES)
    """Columns that are read, if they have other names: `columns: {prompt: problem, ground_truth: answer}`. A dot names a
    field of an object. Not given: prompt, reward_model.ground_truth, data_source, extra_info.index (id)."""
    answer: str = choice(*ANSWER_FORMS)
    """The answer in the column of ground truths: `verbatim` is all of it, `boxed` the content of its last \\boxed{...},
    `hashes` what follows its last #### (GSM8K)."""
    text_prompts: str = choice("verbatim", "user_message")
    """Prompts that are plain text: used without changes, or as a message of the user in the chat template."""
    system_prompt: str | None = None
    """System message of prompts that have none; null for none."""
    chat_template_arguments: dict[str, Any] = free_values()
    """Values that the chat template of the tokenizer reads, such as `{enable_thinking: false}`."""
    overlong_prompts: str = choice("error", "drop", "truncate_left")
    """Prompts above rollout.max_prompt_length: refused, left out and counted, or cut at their start and counted."""
    deduplicate: bool = True
    """Keep the first of rows with the same prompt, and log how many were dropped."""
    train_size: int = number(4000, least=1)
    """Problems to generate for training (countdown)."""
    evaluation_size: int = number(150, least=1)
    """Held-out problems to generate (countdown)."""
    numbers: int = number(3, least=3, most=4)
    """Numbers in each generated problem (countdown). Searches with four are about three times as long as with three."""


@dataclass
class CodeReward:
    """The reward `code`: the last Python block of a response is run on the tests of its problem."""

    test_timeout_s: float = number(4.0, above=0, most=3600)
    """Seconds of processor time that the answer may take for one test, and twice as many of wall-clock time. All tests of one
    response together may take 80% of reward.timeout_s; those that do not fit fail."""
    memory_mb: int = number(1024, least=128, most=2**20)
    """Memory of the answer's process."""
    partial: bool = False
    """Reward the share of the tests that pass, of all that there are. If not, the reward is 1 if all pass, else 0, and the
    tests after the first that fails are not run."""
    modules: tuple[str, ...] = ("numpy",)
    """Modules besides the standard library that an answer may import, if they are installed."""


@dataclass
class HttpReward:
    """The reward `http`: a server scores the responses, see docs/judges.md."""

    url: str | None = None
    """Where the requests go, `https://HOST:PORT/PATH`, without a password."""
    batch: bool = True
    """Send all responses to a problem in one request; if not, each in its own."""
    concurrency: int = number(8, least=1, most=256)
    """Requests that one scorer has open at one time (with batch=false)."""
    timeout_s: float = number(30.0, above=0, most=86400)
    """Seconds that one request may take."""
    max_retries: int = number(3, least=0, most=100)
    """Times that a request is sent again if the server cannot be reached, does not answer in time, answers with status 429 or
    5xx, or with something that is no list of scores. A group without scores after that is dropped and counted."""
    backoff_s: float = number(1.0, above=0, most=3600)
    """The wait before retry n is random, at most backoff_s * 2^(n-1), or as long as the server's Retry-After."""
    token_variable: str | None = None
    """Name of the environment variable with the token that each request carries (`Authorization: Bearer`). The scorers read
    it in their own environment: set it where Ray starts on each node."""


@dataclass
class RewardConfig:
    """How a response is scored."""

    name: str = hook_sum("dapo_math", *REWARDS[1:])
    """The reward function: a built-in one, the import path of your own, `package.module:function`, or a weighted sum such as
    `dapo_math + 0.2*package.module:function`, whose accuracy and answer are those of its first term."""
    by_data_source: dict[str, str] = named_hook_sums(*REWARDS)
    """Rewards of rows by their `data_source`, before those of their sets and `name`: `by_data_source: {codeforces: code}`."""
    overlong_buffer: int = number(4096, least=0)
    """Last tokens of the response limit over which the penalty grows linearly; 0 for no penalty."""
    overlong_factor: float = number(1.0, least=0)
    """Penalty at the limit."""
    scorers: int = number(1, least=1, most=1024)
    """Processes that score, beside the engines. One takes 90 MB and starts in 1 s on an idle core, and scores a group of 16
    responses of 20,480 tokens in 5 ms (dapo_math) or 50 ms (countdown): enough for two cores. More for a slow reward."""
    timeout_s: float = number(10.0, above=0, most=86400)
    """Seconds that scoring one response may take. A group with a slower one is scored once more, by a fresh process, then
    dropped and counted (groups/unscored)."""
    memory_mb: int = number(1024, least=64, most=2**20)
    """Memory that scoring one response may take, in addition to what a scorer uses once it has loaded."""
    max_failure_share: float = number(0.1, least=0, most=1)
    """Share of groups that could not be scored, of the last 200, above which the run stops with its state saved (from 10
    such groups on); 1 never stops it."""
    code: CodeReward = field(default_factory=CodeReward)
    http: HttpReward = field(default_factory=HttpReward)


@dataclass
class EnvironmentConfig:
    """What answers the policy between the turns of a response, such as a tool (docs/environments.md)."""

    name: str | None = hook(None, *ENVIRONMENTS)
    """Import path of your function or class, `package.module:name`; null or `single_turn` for none. Sets may have their own."""
    stop: tuple[str, ...] = ()
    """Texts that end a turn, besides the end-of-sequence token: `[=]`. A turn keeps its stop text. Only for problems with an
    environment."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a turn."""
    max_turns: int = number(8, least=1)
    """Turns of the policy in a response. A response that the environment does not end with the last one has the finish reason
    `length`, as one at rollout.max_response_length, which counts all tokens of a response, those of the environment included."""
    max_observation_tokens: int = number(1024, least=1)
    """Longest answer of an environment in tokens; a longer one loses its end (environment/truncated_observations)."""
    workers: int = number(1, least=1, most=1024)
    """Processes that run environments. All turns of a response are answered by one of them, one turn at a time."""
    timeout_s: float = number(10.0, above=0, most=86400)
    """Seconds that an answer may take. After a slower one the response's turns are replayed once in a fresh process, then its
    group is dropped and counted (environment/failed, groups/unscored)."""
    memory_mb: int = number(1024, least=64, most=2**20)
    """Memory that the environments of a process may take together, in addition to what it uses once it has loaded."""
    max_failure_share: float = number(0.1, least=0, most=1)
    """As reward.max_failure_share, for the answers of environments."""

    def __post_init__(self) -> None:
        """Raises ValueError for a stop text or token that no turn has, or every turn."""
        if "" in self.stop:
            raise ValueError("stop must not contain an empty text, which every turn contains")
        if negative := [token for token in self.stop_token_ids if token < 0]:
            raise ValueError(f"stop_token_ids must be at least 0, not {negative[0]}")


@dataclass
class EvaluationSet:
    """One file of `evaluation.sets`. An entry of text alone is its path. null stands for the setting of the same name in
    `evaluation`, `rollout` or `reward`."""

    path: str = file_path(REQUIRED)
    """Held-out rows, as data.train_path."""
    reward: str | None = hook_sum(None, *REWARDS)
    """As reward.name."""
    max_response_length: int | None = number(None, least=1)
    """As rollout.max_response_length, which it cannot exceed."""
    environment: str | None = hook(None, *ENVIRONMENTS)
    """As environment.name."""
    samples_per_problem: int | None = number(None, least=1)
    """As evaluation.samples_per_problem."""
    temperature: float | None = number(None, least=0)
    """As evaluation.temperature."""
    top_p: float | None = number(None, above=0, most=1)
    """As evaluation.top_p."""
    top_k: int | None = number(None, least=0)
    """As evaluation.top_k."""
    min_p: float | None = number(None, least=0, most=1)
    """As evaluation.min_p."""
    source: str | None = hook(None, *FILE_SOURCES)
    """As data.source."""
    columns: dict[str, str] = named_texts(*COLUMN_NAMES)
    """As data.columns, for this set; a name that is not given is that of data.columns."""
    answer: str | None = choice(None, *ANSWER_FORMS)
    """As data.answer."""


@dataclass
class EvaluationConfig:
    """Measurements on the held-out problems."""

    sets: dict[str, EvaluationSet] = sections()
    """Files of held-out rows by name, in the format of data.source: `sets: {aime24: aime24.parquet}`, or
    evaluation.sets.aime24=FILE; null removes one. Metrics of a set are evaluation/NAME/...; evaluation/avg_at_k is the mean
    over the sets. countdown generates its own set, `countdown`."""
    every: int = number(5, least=0)
    """Iterations between evaluations; 0 evaluates after the last only, which is always evaluated if there are held-out
    problems."""
    samples_per_problem: int = number(32, least=1)
    """k of avg@k, cons@k, pass@k."""
    temperature: float = number(1.0, least=0)
    """Sampling temperature of evaluation."""
    top_p: float = number(0.7, above=0, most=1)
    """Nucleus truncation of evaluation."""
    top_k: int = number(0, least=0)
    """Number of most likely tokens to sample from in evaluation; 0 for all."""
    min_p: float = number(0.0, least=0, most=1)
    """As rollout.min_p, in evaluation."""
    before_training: bool = True
    """Evaluate the starting weights first."""

    def samples_of(self, name: str) -> int:
        """Responses to each problem of the set `name`."""
        of_set = self.sets.get(name)
        return (of_set and of_set.samples_per_problem) or self.samples_per_problem
