"""Environments of runs on countdown."""

import importlib.util
import zlib
from typing import Any

from tests.system.runs import ROOT

_spec = importlib.util.spec_from_file_location("calculator", ROOT / "examples/countdown-tool/calculator.py")
assert _spec is not None
assert _spec.loader is not None
_calculator: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_calculator)
step = _calculator.step


def sometimes(episode: Any) -> Any:
    """Fails for every third problem, after the first turn."""
    if episode.response and zlib.crc32(episode.problem.problem_id.encode()) % 3 == 0:
        return 1 / 0
    return step(episode)


async def wait(episode: Any) -> Any:
    return step(episode)
