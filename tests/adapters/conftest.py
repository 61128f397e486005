"""The adapter pages on the real TRL and verl, in an environment for these tests alone: `make test-adapters` brings it.

It has neither Megatron-Core nor this package's other requirements, so pytest must not load the conftest.py above.
"""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

missing = [name for name in ("trl", "verl") if find_spec(name) is None]
if missing:
    raise pytest.UsageError(f"tests/adapters need {' and '.join(missing)}; `make test-adapters` brings both")
