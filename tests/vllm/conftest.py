"""Tests on the real vLLM. It starts processes and threads, so this folder runs in a separate pytest process.

One engine serves the entire session, since starting one takes longer than all tests on it.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from megatron_fipo.engine.vllm_engine import VLLMEngine
from tests.vllm.model import MAX_MODEL_LEN, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine in the event loop of the session's engine."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def shared_engine(model_folder: Path, run: Callable[..., Any]) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(str(model_folder), "float32", max_model_len=MAX_MODEL_LEN)
    run(engine.ready())
    yield engine
    engine._llm.shutdown()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",  # also if a cluster runs on this machine
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()
