"""The engine as the pool runs it: an asynchronous Ray actor."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from megatron_fipo.engine.protocol import SamplingParams
from megatron_fipo.engine.vllm_engine import VLLMEngine
from megatron_fipo.weight_sync.object_store import push_weights
from tests.generations import plain
from tests.system.runs import LONGEST_S
from tests.vllm.model import MAX_MODEL_LEN, largest_difference, some_requests, weights

PLAIN = SamplingParams(0.7, 1.0, 40)


class ObservedEngine(VLLMEngine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._beside: list[int] = []

    async def _submit(self, *args: Any) -> list[Any]:
        self._beside.append(await self.unfinished())
        return await super()._submit(*args)

    async def beside(self) -> list[int]:
        """Number of unfinished requests in vLLM when each call began to submit its own."""
        return self._beside

    async def unfinished(self) -> int:
        """Number of unfinished requests in vLLM."""
        return self._llm.output_processor.get_num_unfinished_requests()

    async def processes(self) -> list[int]:
        """vLLM's engine process and all other children of this process."""
        me = os.getpid()
        return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == me]


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


@pytest.fixture(scope="module")
def actor(cluster, model_folder) -> Iterator[Any]:
    """Deterministic, without initial weights."""
    handle = (
        ray.remote(ObservedEngine)
        .options(max_concurrency=VLLMEngine.calls_at_once + 4)
        .remote(
            str(model_folder),
            "float32",
            max_model_len=MAX_MODEL_LEN,
            load_weights=False,
            deterministic=True,
            temperature=0.7,
        )
    )
    assert ray.get(handle.status.remote(), timeout=LONGEST_S).weight_version == -1  # the actor is up
    ready, answers_before = handle.ready.remote(), 0
    while not ray.wait([ready], timeout=1)[0]:
        assert ray.get(handle.status.remote(), timeout=LONGEST_S).weight_version == -1
        answers_before += not ray.wait([ready], timeout=0)[0]
    ray.get(ready)
    assert answers_before > 1, "status returns while vLLM starts"
    yield handle
    ray.kill(handle)


def test_generate_needs_weights(actor):
    with pytest.raises(RuntimeError, match="before there were weights"):
        ray.get(actor.generate.remote(some_requests(1), PLAIN))


def test_push_generate_and_die(actor, other_folder):
    push_weights(
        weights(other_folder).items(), {0: actor}, 1, bucket_bytes=2**17, timeout_s=LONGEST_S, check=True
    )
    calls = [some_requests(16, seed) for seed in (0, 100, 200)]
    first = ray.get([actor.generate.remote(call, PLAIN) for call in calls], timeout=LONGEST_S)
    again = [ray.get(actor.generate.remote(call, PLAIN), timeout=LONGEST_S) for call in reversed(calls)][::-1]
    assert plain(first) == plain(again), "a call gives the same bits, whatever else runs"
    assert largest_difference(other_folder, calls[1], first[1], 0.7) < 1e-4

    assert ray.get(actor.beside.remote(), timeout=LONGEST_S) == [0] * 6, (
        "one call at a time: batches do not depend on when calls arrive"
    )

    running = actor.generate.remote(some_requests(500), PLAIN)
    while ray.get(actor.unfinished.remote(), timeout=LONGEST_S) == 0:
        assert not ray.wait([running], timeout=0)[0], "the call ended before it could be aborted"
    assert ray.get(actor.status.remote(), timeout=LONGEST_S).weight_version == 1
    ray.get(actor.abort.remote(), timeout=LONGEST_S)
    generations = ray.get(running, timeout=LONGEST_S)
    assert len(generations) == 500
    assert "abort" in {generation.finish_reason for generation in generations}

    processes = ray.get(actor.processes.remote())
    assert processes
    ray.kill(actor)
    deadline = time.monotonic() + LONGEST_S
    while any(os.path.exists(f"/proc/{pid}") and _state(pid) != "Z" for pid in processes):
        assert time.monotonic() < deadline, "vLLM's engine process outlived its actor"
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
