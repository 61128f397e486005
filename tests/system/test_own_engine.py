"""An engine of the user, by its import path, in a file outside of the package: one iteration by the command line."""

import re
from pathlib import Path

import pytest

from tests.system.runs import ROOT, iterations, run, train_arguments

pytestmark = pytest.mark.timeout(600)

ENGINE = """
import pathlib

from megatron_fipo.engine.local import LocalEngine

MARK = pathlib.Path(__file__).with_name("calls.txt")


class Counting(LocalEngine):
    requests_per_call = 8

    def generate(self, requests, sampling):
        with MARK.open("a") as file:
            file.write(f"{len(requests)}\\n")
        return super().generate(requests, sampling)


class Broken:
    def generate(self, requests, sampling): ...
"""


def test_an_engine_outside_of_the_package_trains(tmp_path: Path):
    (tmp_path / "counting_engine.py").write_text(ENGINE, encoding="utf-8")
    arguments = train_arguments(
        tmp_path / "run",
        "iterations=1",
        "evaluation.before_training=false",
        f"model.path={ROOT}/examples/countdown/base-model",
    )
    arguments[1] = str(ROOT / arguments[1])
    run(*arguments, "rollout.engine=counting_engine:Counting", folder=tmp_path)
    assert len(iterations(tmp_path / "run")) == 1
    sizes = [int(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert sizes
    assert max(sizes) <= 8, "the engine's own requests_per_call"
    refused = run(*arguments, "rollout.engine=counting_engine:Broken", folder=tmp_path, expect=2)
    assert re.search(r"counting_engine:Broken lacks requests_per_call, .*abort", refused.stderr)
