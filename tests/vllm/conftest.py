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
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # else 15: other tests on this machine would starve ranks and engines

import ray

from megatron_fipo.engine.vllm_engine import VLLMEngine
from tests.checkpoint.editing import other_weights, put, set_text, shard
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
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_folder` in two shards with a copy of the tied embedding as head; beside them files that the index does not list."""
    folder = save_model(tmp_path_factory.mktemp("sharded"), seed=0)
    put("lm_head.weight", lambda tensors: tensors["model.embed_tokens.weight"])(folder)
    shard(folder)
    other_weights("adapter_model.safetensors")(folder)
    set_text("pytorch_model.bin", "not read")(folder)
    return folder


@pytest.fixture(scope="session")
def shared_engine(sharded_folder: Path, run: Callable[..., Any]) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(str(sharded_folder), "float32", max_model_len=MAX_MODEL_LEN, stop_strings=True)
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
