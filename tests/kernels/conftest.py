"""Triton's kernels on CPU tensors, in Triton's interpreter: the same source that a GPU compiles, run block by block in numpy.

What this does not exercise: races between programs, and speed; `tools/gpu_check.py` does, on a GPU. That the kernels compile for
one is tested here, without one.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    raise pytest.UsageError(
        "tests/kernels need Triton and TRITON_INTERPRET=1 in the environment; `make test` brings both"
    )

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from gpu.interpreter import mend_interpreter

mend_interpreter()
