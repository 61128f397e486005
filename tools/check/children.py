"""Runs the sections of the GPU check in processes of their own, and passes on what they report."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.report import FAILED, SKIPPED, Row, reason, title_of_test
from tools.check.sections import Section

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


@dataclass
class _Child:
    """What a child has reported."""

    cases: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    running: str | None = None
    since: float = field(default_factory=time.monotonic)
    """When the running case began; of the first case, when the process began."""
    failed: bool = False
    """Whether the running case has reported that it failed."""
    killed: str = ""
    """Why it was killed, if it was: "case" (the running case took too long) or "section" (no time is left)."""


def run_section(
    section: Section, environment: dict[str, str], log: Path, deadline: float, add: Callable[[Row], None]
) -> None:
    """All cases of a section. A case that crashes or hangs costs one row: the rest runs in a new process."""
    end = min(time.monotonic() + section.budget_s, deadline)
    pending = list(section.one_each)
    while True:
        chosen = pending[:1] if section.one_each else pending
        child, code = _run_child(section, chosen, environment, log, end, add)
        case = child.running or (chosen[0] if section.one_each else section.name)
        if section.one_each:
            pending = pending[1:]
        else:
            pending = [case for case in child.cases if case not in child.begun]
        if child.killed or code is None:
            # A check that did not finish has shown nothing: a kernel that hangs must not look like one left out.
            verdict = FAILED if section.correctness else SKIPPED
            why = f"it took more than {section.case_s:.0f} s"
            if child.killed == "section" or code is None:
                why = f"the section's {section.budget_s:.0f} s or the time of the entire check are used up"
                case, pending = f"{case} and the following" if pending else case, []
            add(reason(verdict, section.name, _title(case), why, section.correctness))
        elif code != 0 and (child.running or not child.begun) and not child.failed:
            why = f"its process ended with {code}: {_last_line(log)}"
            add(reason(FAILED, section.name, _title(case), why, section.correctness))
        if not pending or not (child.begun or section.one_each):
            return


def _title(case: str) -> str:
    """The row's name for a case: of a test's id, its last part."""
    return title_of_test(case) if "::" in case else case


def _run_child(
    section: Section,
    cases: list[str],
    environment: dict[str, str],
    log: Path,
    end: float,
    add: Callable[[Row], None],
) -> tuple[_Child, int | None]:
    """One process with these cases (all if none are given), its output at the end of `log`; its exit code, None if
    it could not be killed.
    """
    command = [sys.executable, "-m", *section.command]
    if cases:
        # Ids of tests name their file; the command names it for all of them.
        command = [part for part in command if not part.endswith(".py")] + cases
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as output:
        messages = Path(folder) / "rows.jsonl"
        messages.touch()
        output.write(f"\n=== {section.name}: {', '.join(cases) or 'all cases'}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"GPU_CHECK_ROWS": str(messages)},
            cwd=ROOT,
            start_new_session=True,  # so that its own children can be ended with it
        )
        try:
            child = _follow(section, process, messages, end, add)
        except BaseException:  # such as Ctrl-C, which does not reach another session
            _kill(process)
            raise
    return child, process.returncode


def _follow(
    section: Section, process: subprocess.Popen, messages: Path, end: float, add: Callable[[Row], None]
) -> _Child:
    """Pass rows to `add` until the process ends, or kill it when its time or that of a case is used up."""
    child = _Child()
    with messages.open(encoding="utf-8") as lines:
        rest = ""
        while True:
            running = process.poll() is None
            rest += lines.read()
            *complete, rest = rest.split("\n")
            for message in map(json.loads, complete):
                _take(message, section, child, add)
            if not running:
                return child
            now = time.monotonic()
            if now >= end or now >= child.since + section.case_s:
                child.killed = "section" if now >= end else "case"
                _kill(process)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:  # it hangs in the driver
                    return child
                continue
            time.sleep(POLL_S)


def _kill(process: subprocess.Popen) -> None:
    """The process and its children, unless it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _take(message: dict, section: Section, child: _Child, add: Callable[[Row], None]) -> None:
    if "cases" in message:
        child.cases = message["cases"]
    elif "row" in message:
        row = Row(**message["row"] | {"section": section.name})
        child.failed |= row.verdict == FAILED
        add(row)
    elif "begin" in message:
        if child.begun:
            child.since = time.monotonic()
        child.begun.append(message["begin"])
        child.running, child.failed = message["begin"], False
    else:
        child.running = None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
