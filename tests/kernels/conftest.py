"""Triton's kernels on CPU tensors, in Triton's interpreter: the source that a GPU compiles, run block by block in numpy.

This does not exercise races between programs, or speed; `tools/gpu_check.py` does, on a GPU. That the kernels compile for one
is tested here, without one.
"""

import os
from importlib.util import find_spec

import pytest

from tests.gpu.interpreter import fix_interpreter

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    raise pytest.UsageError(
        "tests/kernels need Triton and TRITON_INTERPRET=1 in the environment; `make test` brings both"
    )

fix_interpreter()
