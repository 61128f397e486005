"""Whether all nodes see the same shared folder: the head and each node read what the other has written there.

    python -m megatron_fipo.node.preflight.canary place|answer|collect FOLDER TOKEN SECONDS [RANK...]

Each step runs in a child process, since a dead file system never answers. Prints nothing if it succeeds.
"""

import shutil
import sys
import time
from pathlib import Path

from megatron_fipo.errors import one_line
from megatron_fipo.node.preflight.children import Check, result_printer

POLL_S = 0.1
HEAD_FILE = "head"
GRACE_S = 5.0
"""Seconds that a step has beyond its own time limit, to start and to report."""


def place(folder: Path, token: str) -> None:
    """On the head: write the token into a new folder, which is named after it so that no node has looked for it before."""
    place = _place(folder, token)
    place.mkdir(parents=True)
    (place / HEAD_FILE).write_text(token)


def answer(folder: Path, token: str, timeout_s: float, rank: str) -> None:
    """On a node: wait until the head's file can be read, then write one of its own.

    Raises OSError or TimeoutError.
    """
    file = _place(folder, token) / HEAD_FILE
    deadline = time.monotonic() + timeout_s
    while not (file.is_file() and file.read_text() == token):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the head's file did not appear there in {timeout_s:g} s")
        time.sleep(POLL_S)
    (file.parent / rank).write_text(token)


def collect(folder: Path, token: str, timeout_s: float, ranks: list[str]) -> list[str]:
    """On the head: the ranks whose file cannot be read after `timeout_s`. Removes the token's folder."""
    place = _place(folder, token)
    deadline = time.monotonic() + timeout_s
    unseen = ranks
    while unseen := [rank for rank in unseen if not (place / rank).is_file()]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    shutil.rmtree(place, ignore_errors=True)
    return unseen


def step(
    action: str, folder: Path, token: str, timeout_s: float, *ranks: str
) -> tuple[list[str], str | None]:
    """Run one step in a child process; returns what it found and why it failed."""
    check = Check(__name__, action, str(folder), token, str(timeout_s), *ranks)
    values, failure = check.results(time.monotonic() + timeout_s + GRACE_S)
    return values[-1] if values else [], failure


def _place(folder: Path, token: str) -> Path:
    return folder / f".preflight-{token}"


def main(action: str, folder: str, token: str, timeout: str, *ranks: str) -> int:
    """Run one step; prints the ranks that `collect` did not see, as JSON."""
    report = result_printer()
    try:
        if action == "place":
            place(Path(folder), token)
        elif action == "answer":
            answer(Path(folder), token, float(timeout), ranks[0])
        else:
            report(collect(Path(folder), token, float(timeout), list(ranks)))
    except OSError as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
