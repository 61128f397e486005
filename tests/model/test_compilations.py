"""Packs have new lengths in every iteration: no function may be compiled again for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _compilations(family: str, recompute: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of each function, and of all of them until after each pack."""
    command = [sys.executable, "-m", "tests.model.compilations", family, recompute]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["functions"], found["total"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_dense_model_compiles_nothing(recompute):
    functions, _ = _compilations("qwen2", recompute)
    assert functions == {}


def test_experts_compile_in_the_first_pack_alone():
    functions, total = _compilations("qwen3_moe", "none")
    # For one length and for any, each with and without gradient.
    assert set(functions) == {"weighted_swiglu", "weighted_swiglu_back"}
    assert max(functions.values()) <= 4
    assert len(total) == 50
    assert total["1"] == total["50"]
