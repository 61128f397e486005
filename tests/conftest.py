"""One thread per process, set before torch starts threads, so that `ranks.run_ranks` can fork."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch

import megatron_fipo.model  # noqa: F401  (the CPU platform, before any test imports Megatron-Core)

torch.set_num_threads(1)
with suppress(ImportError):  # tools/gpu_check.py runs tests/gpu with pytest alone
    import hypothesis

    hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
    hypothesis.settings.load_profile("untimed")

OWN_PROCESS = ("system", "vllm", "kernels", "adapters")
"""Folders whose tests start threads, so that the same process cannot fork ranks, or need Triton's interpreter or other libraries."""
STARTING = ("system", "vllm")
"""Folders whose tests start Ray, vLLM or complete runs."""
START_TIMEOUT_S = 1200
"""Time limit of such a test: several starts on a machine that is ten times slower than usual."""


@pytest.fixture(autouse=True)
def limits_of_the_process() -> Iterator[None]:
    """A test must not lower the memory limit of this process, as scorers do with theirs: later tests would fail."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    after = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before[0], after[1]))
    assert after == before, (
        "the test limited the memory of the test process; run that code in a child process"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in STARTING and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Exclude these folders from a run of all tests. `pytest tests/system` selects one by name."""
    name = collection_path.name
    apart = collection_path.parent == Path(__file__).parent and name in OWN_PROCESS
    return True if apart and not any(name in str(argument) for argument in config.args) else None
