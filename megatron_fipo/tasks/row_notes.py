"""What a user should know of the rows of a set: repeated prompts, contradicting answers, prompts above the limit."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_fipo.errors import UserError, listed
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.row import Row
from megatron_fipo.tasks.task import EncodePrompt, Log, Problem, PromptTooLongError

NAMED_ROWS = 5
"""Rows that a message names; it counts the others."""
ROWS_PER_NOTE = 1_000_000
"""Rows between notes that a set is still being read."""


@dataclass
class RowNotes:
    """Counts rows while they are read, and reports them afterwards."""

    title: str
    """The set."""
    unit: str
    log: Log
    first: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Label and answer of the first row with each prompt, by the prompt's digest."""
    rows: int = 0
    as_messages: int = 0
    """Rows whose prompt is a list of messages."""
    as_json: int = 0
    """Rows whose prompt is JSON text of messages."""
    json_columns: dict[str, int] = field(default_factory=dict)
    """Rows with JSON text of an object, by the column."""
    left_out: set[str] = field(default_factory=set)
    """Columns that problems do not have, because of values that JSON has not."""
    repeated: int = 0
    contradictions: int = 0
    """Rows whose answer differs from that of the first row with the same prompt."""
    contradicting: list[str] = field(default_factory=list)
    """The first of them, for the message."""
    longest: int = 0
    """Tokens of the longest prompt above the limit."""
    long_rows: int = 0
    long_labels: list[str] = field(default_factory=list)
    """The first of them, for the message."""
    first_error: PromptTooLongError | None = None

    def repeats(self, label: str, row: Row) -> bool:
        """Count the row; whether an earlier row has the same prompt."""
        self.rows += 1
        if self.rows % ROWS_PER_NOTE == 0:
            self.log(f"{self.title}: {self.rows:,} rows read so far")
        self.as_messages += not isinstance(row.prompt, str)
        self.as_json += row.prompt_was_json
        for name in row.json_columns:
            self.json_columns[name] = self.json_columns.get(name, 0) + 1
        key = digest(row.prompt)
        if key not in self.first:
            self.first[key] = (label, row.ground_truth)
            return False
        self.repeated += 1
        first, answer = self.first[key]
        if answer != row.ground_truth:
            self.contradictions += 1
            if self.contradictions <= NAMED_ROWS:
                self.contradicting.append(f"{first} ({answer!r:.40}) and {label} ({row.ground_truth!r:.40})")
        return True

    def too_long(self, label: str, error: PromptTooLongError) -> None:
        """Count a row with a prompt above the limit."""
        self.long_rows += 1
        self.longest = max(self.longest, error.tokens)
        self.first_error = self.first_error or error
        if self.long_rows <= NAMED_ROWS:
            self.long_labels.append(label)

    def refuse_too_long(self) -> None:
        """Raise `UserError` that names the rows with a prompt above the limit, if there are any."""
        if self.first_error is not None and self.long_rows == 1:
            raise self.first_error
        if self.long_rows:
            raise UserError(
                f"{self._long_rows}; raise the limit, remove these rows, or set data.overlong_prompts=drop or truncate_left"
            )

    @property
    def _long_rows(self) -> str:
        return (
            f"{self.title}: {self.long_rows:,} of {self.rows:,} rows have a prompt above rollout.max_prompt_length, "
            f"the longest with {self.longest} tokens ({self.unit}s {listed(self.long_labels, NAMED_ROWS, self.long_rows)})"
        )

    def report(self, deduplicate: bool, overlong: str, encode: EncodePrompt) -> None:
        """One sentence for each thing that a user should know of the set."""
        log, title = self.log, self.title
        if deduplicate and self.repeated:
            log(f"{title}: dropped {self.repeated:,} of {self.rows:,} rows with a duplicate prompt")
        if self.contradictions:
            used = "the first answer is used" if deduplicate else "all are used"
            log(
                f"{title}: rows with the same prompt have different answers, {used}: {self.unit}s "
                f"{listed(self.contradicting, NAMED_ROWS, self.contradictions)}; correct the file if that is not intended"
            )
        if self.long_rows:
            done = "dropped" if overlong == "drop" else "cut at their start"
            log(f"{self._long_rows}; they are {done} (data.overlong_prompts={overlong})")
        if self.as_json:
            log(f"{title}: {self.as_json:,} prompts are JSON text of messages and are read as messages")
        for name, count in self.json_columns.items():
            log(f"{title}: `{name}` of {count:,} rows is JSON text of an object and is read as the object")
        if self.left_out:
            log(
                f"{title}: rewards do not get the columns {listed(sorted(self.left_out), 12)}, whose values are not texts, "
                "numbers, lists or objects"
            )
        report_forms(title, self.rows - self.as_messages, self.as_messages, encode, log)

    def report_equal_texts(self, different: int, problems: Iterable[Problem]) -> None:
        """Report if the problems have fewer texts than there are different prompts among them."""
        same = different - len({problem.prompt_text for problem in problems})
        if same > 0:
            self.log(
                f"{self.title}: {same:,} of {different:,} different prompts have the formatted text of another one; "
                "check the chat template"
            )


def report_forms(title: str, texts: int, messages: int, encode: EncodePrompt, log: Log) -> None:
    """How many prompts of a set are used in another form than stored, or without the chat template that there is."""
    if messages and not encode.has_chat_template:
        log(
            f"{title}: the tokenizer has no chat template, so the {messages:,} prompts stored as a "
            "message of the user are its content alone"
        )
    if texts and encode.has_chat_template and not encode.wraps_texts:
        log(
            f"{title}: {texts:,} prompts are plain text and are used without the chat template; "
            "data.text_prompts=user_message makes messages of them"
        )
