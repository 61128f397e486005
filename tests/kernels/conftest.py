"""Triton's kernels on CPU tensors, in Triton's interpreter: the same source that a GPU compiles, run block by block in numpy.

What this does not exercise: the compiler, races between programs, and speed; `tools/gpu_check.py` does, on a GPU.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels run Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
pytest.importorskip("triton", reason="Triton is not installed; make test brings it")
