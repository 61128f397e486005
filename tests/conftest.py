"""One thread per process, set before torch starts threads, so that `ranks.run_ranks` can fork."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch

import megatron_fipo.model  # noqa: F401  (the CPU platform, before any test imports Megatron-Core)

torch.set_num_threads(1)

OWN_PROCESS = ("system", "vllm", "kernels", "adapters")
"""Folders whose tests start threads, so that the same process cannot fork ranks, or need Triton's interpreter or other libraries."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Exclude these folders from a run of all tests. `pytest tests/system` selects one by name."""
    name = collection_path.name
    apart = collection_path.parent == Path(__file__).parent and name in OWN_PROCESS
    return True if apart and not any(name in str(argument) for argument in config.args) else None
