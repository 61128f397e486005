"""Rows of the GPU check and the table made of them. Pure: no device, no clock, no files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

OK, MET, MISSED, FAILED, SKIPPED, FIGURE = "ok", "met", "NOT MET", "FAILED", "skipped", "measured"
"""Verdicts of a row: OK and FAILED for checks, MET and MISSED for figures with an aim, FIGURE for those without."""
LONGEST_REASON = 160


@dataclass(frozen=True)
class Row:
    """One result of a section."""

    section: str
    name: str
    """Of a test with parameters: `test [parameters]`."""
    verdict: str
    result: str
    """For people: the figures that matter, or the reason."""
    figures: dict[str, float | str] = field(default_factory=dict)
    """For machines: everything that was measured, units in the names."""
    correctness: bool = False
    """Whether FAILED here makes the entire check fail."""


@dataclass(frozen=True)
class Report:
    """All results so far."""

    machine: dict[str, str]
    """Device, driver, versions and date."""
    rows: list[Row]
    seconds: float
    finished: bool
    rehearsal: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def correct(self) -> bool:
        """No correctness check failed."""
        return not any(row.correctness and row.verdict == FAILED for row in self.rows)


def reason(verdict: str, section: str, name: str, why: object, correctness: bool) -> Row:
    """A row without figures, and why there are none, on one line."""
    text = " ".join(str(why).split()) or type(why).__name__
    shown = text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
    return Row(section, name, verdict, f"{verdict}: {shown}", {"reason": text}, correctness)


def title_of_test(test_id: str) -> str:
    """`tests/gpu/test_loss.py::test_many_shapes[triton-long]` → `many shapes [triton-long]`."""
    test, bracket, case = test_id.partition("::")[2].removeprefix("test_").partition("[")
    return test.replace("_", " ") + (f" [{case}" if bracket else "")


def aimed(met: bool) -> str:
    return MET if met else MISSED


def errors_text(figures: dict[str, float | str]) -> str:
    """The errors that a check measured, to one digit."""
    return ", ".join(f"{kind} {error:.0e}" for kind, error in figures.items() if isinstance(error, float))


def render(report: Report) -> str:
    """The Markdown table, below a line that names the machine; failures and missed aims are listed again below it."""
    lines = [", ".join(f"{key} {value}" for key, value in report.machine.items()), ""]
    if report.rehearsal:
        lines += ["**Rehearsal on a CPU at toy sizes: the figures mean nothing.**", ""]
    lines += ["| section | what | result | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {row.section} | {row.name} | {_cell(row.result)} | {row.verdict} |"
        for row in _folded(report.rows)
    ]
    state = "finished" if report.finished else "NOT finished"
    lines += ["", f"{state} after {report.seconds:.0f} s: {_counts(report.rows)}"]
    for verdict in (FAILED,) if report.rehearsal else (FAILED, MISSED):
        names = [f"{row.section}: {row.name}" for row in report.rows if row.verdict == verdict]
        if names:
            lines.append(f"{verdict}: {'; '.join(names)}")
    return "\n".join(lines) + "\n"


def _folded(rows: Sequence[Row]) -> list[Row]:
    """Rows with the passed cases of one test as one row, which has the largest error of each kind."""
    folded = []
    for (section, test, passed), group in groupby(rows, lambda row: (*_test(row), row.verdict == OK)):
        cases = list(group)
        if not passed or len(cases) == 1:
            folded += cases
            continue
        worst: dict[str, float | str] = {}
        for row in cases:
            for kind, error in row.figures.items():
                if isinstance(error, float):
                    worst[kind] = max(error, float(worst.get(kind, 0.0)))
        result = f"{len(cases)} x {errors_text(worst)}" if worst else f"{len(cases)} passed"
        folded.append(Row(section, test, OK, result, worst, True))
    return folded


def _test(row: Row) -> tuple[str, str]:
    return row.section, row.name.partition(" [")[0]


def _counts(rows: Sequence[Row]) -> str:
    verdicts = [row.verdict for row in rows]
    return ", ".join(
        f"{verdicts.count(v)} {v}" for v in (OK, MET, MISSED, FAILED, SKIPPED, FIGURE) if v in verdicts
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def duration(seconds: float) -> str:
    """Three significant digits, in a unit that suits."""
    return f"{1e6 * seconds:.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:.4g} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
