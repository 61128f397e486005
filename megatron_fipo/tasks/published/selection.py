"""Which problems of published files are kept: each prompt once, with one answer. Everything left out is counted.

Files are read as a stream. Memory grows with the number of different prompts, not of rows: the published file of DAPO
has 1.79 million rows of 17 thousand prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError, listed
from megatron_fipo.tasks.dataset import digest
from megatron_fipo.tasks.published.forms import PublishedProblem, form_of
from megatron_fipo.tasks.published.sets import PublishedSet
from megatron_fipo.tasks.row_reader import ROW_UNITS, find_format, read_rows

NAMED = 3
"""Problems or reasons that a message names; it counts the others."""


@dataclass
class _Prompt:
    """What the rows with one prompt say."""

    first: str
    """Where its first row is."""
    problem: PublishedProblem
    rows: int = 0
    other: str = ""
    """Where the first row with another answer is, and both answers; empty without one."""


@dataclass
class _Refused:
    first: str
    rows: int = 0


@dataclass
class Selection:
    """The result of reading the files of one set."""

    published: PublishedSet
    rows: int = 0
    prompts: dict[bytes, _Prompt] = field(default_factory=dict)
    """By digest, in the order of their first rows."""
    refused: dict[str, _Refused] = field(default_factory=dict)
    """By reason."""

    @property
    def kept(self) -> list[PublishedProblem]:
        """One problem for each prompt with one answer, in the order of the files."""
        return [prompt.problem for prompt in self.prompts.values() if not prompt.other]

    def add(self, where: str, problem: PublishedProblem) -> "_Prompt | _Refused":
        """What a row with this content counts for."""
        answer = self.published.answer(problem.answer)
        if answer is None:
            return self.refuse(
                where, f"its answer is not {self.published.answers} (as {problem.answer!r:.40})"
            )
        problem = PublishedProblem(problem.prompt, answer, problem.index)
        prompt = self.prompts.setdefault(digest(problem.prompt), _Prompt(where, problem))
        if prompt.problem.answer != answer and not prompt.other:
            prompt.other = f"{prompt.first} ({prompt.problem.answer!r:.40}) and {where} ({answer!r:.40})"
        return prompt

    def refuse(self, where: str, reason: str) -> _Refused:
        """A row that is no problem of the set."""
        return self.refused.setdefault(reason, _Refused(where))

    def report(self) -> list[str]:
        """One sentence for each number. They add up to the rows."""
        contradictory = [prompt for prompt in self.prompts.values() if prompt.other]
        repeats = sum(prompt.rows - 1 for prompt in self.prompts.values() if not prompt.other)
        lines = [f"read {self.rows:,} rows with {len(self.prompts):,} different prompts"]
        if repeats:
            lines.append(f"dropped {repeats:,} rows that repeat a prompt with its answer")
        if contradictory:
            lines.append(
                f"dropped {len(contradictory):,} prompts with different answers, {sum(p.rows for p in contradictory):,} "
                f"rows: {listed([p.other for p in contradictory], NAMED)}"
            )
        lines += [
            f"refused {refused.rows:,} rows, the first {refused.first}: {reason}"
            for reason, refused in self.refused.items()
        ]
        return lines

    def check(self) -> None:
        """Raise `UserError` if this is not the published set."""
        published = self.published
        if not self.kept or len(self.prompts) not in published.distinct:
            raise UserError(
                f"this is not {published.title}, which has {published.known}: {'; '.join(self.report())}"
            )
        if len(published.distinct) == 1 and len(self.kept) not in published.distinct:
            raise UserError(
                f"{published.title} has {published.known}, but {len(self.kept)} are left: {'; '.join(self.report())}"
            )
        if not any(published.mark.search(problem.prompt) for problem in self.kept):
            raise UserError(
                f"this is not {published.title}: no problem contains its first one; check the year of the file"
            )


def select(published: PublishedSet, files: Sequence[Path]) -> Selection:
    """Read the files, in their order.

    A row whose content was seen is counted without being parsed again. Raises `UserError` for a file that cannot be
    read or has other columns, and if the problems are not those of the set.
    """
    selection = Selection(published)
    seen: dict[bytes, _Prompt | _Refused] = {}
    for where, form_read, values, content in _rows(files):
        selection.rows += 1
        outcome = seen.get(content)
        if outcome is None:
            try:
                outcome = selection.add(where, form_read(where, values))
            except UserError as error:
                outcome = selection.refuse(where, str(error).removeprefix(f"{where} "))
            seen[content] = outcome
            if max(len(selection.prompts), len(selection.refused)) >= published.distinct.stop:
                raise UserError(
                    f"this is not {published.title}, which has {published.known}: {files[0]} has more; check the file"
                )
        outcome.rows += 1
    selection.check()
    return selection


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Any, dict[str, Any], bytes]]:
    """(name of the row, its form's reader, row, digest of prompt and answer) of every row."""
    for path in files:
        file_format, columns = find_format(path)
        form = form_of(str(path), columns)
        content = form.content
        for number, values in read_rows(path, file_format, form.wanted):
            where = f"{path.name} {ROW_UNITS[file_format]} {number}"
            yield where, form.read, values, digest(*(values.get(name) for name in content))
