"""Runs a section's cases in a process of their own, so that a kernel that breaks the device costs its own case and no other.

The child writes one JSON line when a case begins and one per row; the parent reads them as they come, so nothing that was
measured is lost with a child that hangs, dies or is out of time.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu.report import FAILED, SKIPPED, Row, reason

DEVICE_LOST = 75
"""Exit code of a child whose last case left the device unusable."""
POLL_S = 0.2


@dataclass(frozen=True)
class Section:
    """A module with `CASES`: name → function from a `Bench` to rows."""

    name: str
    module: str
    budget_s: float
    correctness: bool


def run_section(
    section: Section,
    command: list[str],
    environment: dict[str, str],
    log: Path,
    deadline: float,
    say: Callable[[Row], None],
) -> None:
    """All cases of a section. `command` starts a child of this section; its output goes to the end of `log`."""
    end = min(time.monotonic() + section.budget_s, deadline)
    first = 0
    while True:
        with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as output:
            messages = Path(folder) / "rows.jsonl"
            messages.touch()
            output.write(f"\n=== {section.name}, from case {first}\n")
            output.flush()
            arguments = [*command, "--rows", str(messages), "--from-case", str(first)]
            child = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
            case, count = _follow(child, messages, end, say)
        if child.returncode == 0:
            return
        name, index, done = case
        if child.returncode is None or (child.returncode == -9 and time.monotonic() >= end):
            why = f"the section's {section.budget_s:.0f} s or the time of the whole check are used up"
            what = name if index + 1 >= count else f"{name} and what follows"
            # A check that did not finish has shown nothing: a kernel that hangs must not look like one that was left out.
            say(
                reason(
                    FAILED if section.correctness else SKIPPED, section.name, what, why, section.correctness
                )
            )
            return
        if not done:
            why = f"its process ended with {child.returncode}: {_last_line(log)}"
            say(reason(FAILED, section.name, name, why, section.correctness))
        first = index + 1
        if first >= count:
            return


def _follow(
    child: subprocess.Popen, messages: Path, end: float, say: Callable[[Row], None]
) -> tuple[tuple[str, int, bool], int]:
    """Pass rows on until the child ends or its time does. Its last case (name, index, whether it ended), and how many there are."""
    case, count = ("start", -1, False), 0
    with messages.open(encoding="utf-8") as lines:
        rest = ""
        while True:
            running = child.poll() is None
            rest += lines.read()
            *whole, rest = rest.split("\n")
            for message in map(json.loads, whole):
                if "row" in message:
                    say(Row(**message["row"]))
                else:
                    case, count = (message["case"], message["index"], message["done"]), message["count"]
            if not running:
                return case, count
            if time.monotonic() >= end:
                child.kill()
                try:
                    child.wait(timeout=20)
                except subprocess.TimeoutExpired:  # stuck in the driver
                    return case, count
                continue
            time.sleep(POLL_S)


def _last_line(log: Path) -> str:
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1] if lines else "no output"


def run_cases(section: Section, first: int, messages: Path, make_bench: Callable[[], Any]) -> int:
    """The child's part: every case from `first` on; its exit code."""
    from gpu.measure import release, synchronize

    with messages.open("a", encoding="utf-8") as stream:

        def tell(message: dict[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        bench = make_bench()
        cases = importlib.import_module(section.module).CASES
        for index, (name, case) in enumerate(cases.items()):
            if index < first:
                continue
            place = {"case": name, "index": index, "count": len(cases)}
            tell(place | {"done": False})
            for row in guarded(section, name, lambda case=case: case(bench)):
                tell({"row": asdict(row)})
            try:
                release(bench)
                synchronize(bench)
            except RuntimeError as error:
                why = f"the device was unusable afterwards: {error}"
                tell({"row": asdict(reason(FAILED, section.name, name, why, section.correctness))})
                tell(place | {"done": True})
                os._exit(DEVICE_LOST)
            tell(place | {"done": True})
    return 0


def guarded(section: Section, name: str, case: Callable[[], Iterable[Row]]) -> Iterable[Row]:
    """The rows of a case; what it raises becomes its last row."""
    import traceback

    from gpu.measure import is_out_of_memory

    try:
        yield from case()
    except ModuleNotFoundError as error:
        yield reason(SKIPPED, section.name, name, f"{error.name} is not installed", False)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        if is_out_of_memory(error):
            verdict = FAILED if section.correctness else SKIPPED
            yield reason(verdict, section.name, name, f"out of memory: {error}", section.correctness)
            return
        wrong = section.correctness or isinstance(error, AssertionError)
        yield reason(FAILED, section.name, name, f"{type(error).__name__}: {error}", wrong)
