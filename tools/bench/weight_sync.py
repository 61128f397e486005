"""Weights into rollout engines through Ray's object store, against a plain copy of the same bytes; and how engines start.

    python -m tools.bench.weight_sync     # about three minutes on an idle machine; prints the tables of docs/weight-sync.md

One process has a Qwen2-shaped model with random bfloat16 weights, as a trainer's rank 0 does, and pushes it to local engines,
which are Ray actors as in a run. All rows are measured in turn, several times; the shortest time and the largest memory count.
The plain copy is made in the sending process just before each push. Memory is sampled every 5 ms during a push: growth of a
process's own pages, and bytes of the object store that the trainer has touched.
"""

import importlib.util
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from safetensors.torch import load_file

from megatron_fipo.driver.rollout.engine_actors import CONTROL_CALLS
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.weight_sync.checksum import Checksums
from megatron_fipo.weight_sync.object_store import push_weights
from megatron_fipo.weight_sync.transport import BUCKETS_IN_STORE
from tests.tiny_qwen2 import save_qwen2, save_tokenizer
from tools.bench.harness import ROOT, heading, parser, table

BUCKET_BYTES = 128 * 2**20
PUSHES, STARTS = 12, 2
GB = 1e9


def write_model(folder: Path) -> Path:
    """A folder with 0.39 billion random parameters, tied embeddings, and a tokenizer with an end token."""
    torch.set_default_dtype(torch.bfloat16)
    save_tokenizer(folder)
    return save_qwen2(
        folder,
        0,
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


class Memory:
    """Peak of this process, in bytes: growth of its own pages since the start, and shared pages that it has touched."""

    def start(self) -> None:
        self._before = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        self._stop.set()
        self._thread.join()
        (own, shared), (own_before, _) = self._most, self._before
        return own - own_before, shared

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            own, shared = self._now()
            self._most = max(self._most[0], own), max(self._most[1], shared)

    def _now(self) -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssShmem"].split()[0]) * 1024


class Trainer:
    """In the position of the trainer's rank 0: has the weights and pushes them."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.weights = {
            name: tensor.clone() for name, tensor in load_file(Path(folder, "model.safetensors")).items()
        }
        self.memory = Memory()

    def size(self) -> tuple[int, int]:
        return sum(tensor.nbytes for tensor in self.weights.values()), len(self.weights)

    def copy(self) -> float:
        """Seconds of one thread's copy of every tensor into memory that has been written to before."""
        target = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        start = time.perf_counter()
        for name, tensor in self.weights.items():
            target[name].copy_(tensor)
        return time.perf_counter() - start

    def read(self) -> float:
        """Seconds of one thread's checksum of every tensor."""
        start = time.perf_counter()
        checksums = Checksums()
        for name, tensor in self.weights.items():
            checksums.add(name, tensor)
        checksums.finish()
        return time.perf_counter() - start

    def push(self, engines: dict[int, Any], version: int, check: bool) -> tuple[float, tuple[int, int]]:
        """Seconds, and memory."""
        self.memory.start()
        start = time.perf_counter()
        push_weights(
            self.weights.items(), engines, version, bucket_bytes=BUCKET_BYTES, timeout_s=600.0, check=check
        )
        return time.perf_counter() - start, self.memory.stop()


class Engine(LocalEngine):
    """A local engine that measures its memory."""

    def watch(self) -> None:
        self.memory = Memory()
        self.memory.start()

    def watched(self) -> tuple[int, int]:
        return self.memory.stop()


@dataclass(frozen=True)
class Push:
    """Seconds, and bytes: growth of the trainer's own memory and of an engine's, and what the trainer touched of the store."""

    seconds: float
    trainer: int
    engine: int
    store: int

    def with_extremes(self, other: "Push") -> "Push":
        """The shorter time and the larger memory."""
        memory = (
            max(getattr(self, field), getattr(other, field)) for field in ("trainer", "engine", "store")
        )
        return Push(min(self.seconds, other.seconds), *memory)


def measure_pushes(folder: Path) -> str:
    """A table of pushes by number of engines and check, against the plain copy."""
    trainer: Any = ray.remote(Trainer).options(num_cpus=1).remote(str(folder))
    engines = {number: start_engine(Engine, folder, load_weights=False) for number in range(2)}
    ray.get([engine.ready.remote() for engine in engines.values()])
    size, count = ray.get(trainer.size.remote())
    found: dict[tuple[int, bool], Push] = {}
    copies: list[float] = []
    reads: list[float] = []
    for version in range(1, PUSHES + 1):
        reads.append(ray.get(trainer.read.remote()))
        for engine_count, check in [(1, False), (1, True), (2, False), (2, True)]:
            chosen = {number: engines[number] for number in range(engine_count)}
            copies.append(ray.get(trainer.copy.remote()))
            ray.get([engine.watch.remote() for engine in chosen.values()])
            seconds, memory = ray.get(trainer.push.remote(chosen, version, check))
            engine_memory = ray.get(engines[0].watched.remote())
            ray.get([engine.watched.remote() for number, engine in chosen.items() if number])
            new = Push(seconds, memory[0], engine_memory[0], memory[1])
            found[engine_count, check] = new.with_extremes(found.get((engine_count, check), new))
    for actor in (trainer, *engines.values()):
        ray.kill(actor)
    copy, read = min(copies), min(reads)

    def times(seconds: float) -> tuple[str, ...]:
        return f"{seconds:.2f} s", f"{seconds / size * GB:.2f} s", f"{seconds / copy:.1f}"

    rows = [("plain copy, one thread", *times(copy), "", "", "")]
    rows.append(("checksum, one thread", *times(read), "", "", ""))
    for (engine_count, check), push in found.items():
        name = (
            f"push to {engine_count} engine{'s' * (engine_count > 1)}, {'with' if check else 'without'} check"
        )
        memory = f"+{push.trainer / 2**20:,.0f} MiB", f"+{push.engine / 2**20:,.0f} MiB"
        rows.append((name, *times(push.seconds), *memory, f"{push.store / 2**20:,.0f} MiB"))
    heads = ("", "time", "per GB", "time / copy", "trainer's own memory", "engine's own memory")
    title = f"{size / GB:.2f} GB in {count} tensors, buckets of {BUCKET_BYTES // 2**20} MiB, best of {PUSHES}"
    return f"{title}\n\n{table((*heads, 'object store touched'), rows)}"


def start_engine(engine_class: Any, folder: Path, **arguments: Any) -> Any:
    options = {"num_cpus": 1, "max_concurrency": engine_class.calls_at_once + CONTROL_CALLS}
    return ray.remote(engine_class).options(**options).remote(str(folder), "bfloat16", **arguments)


def measure_starts(folder: Path) -> str:
    """A table of seconds until an engine's process answers and until its model is ready, with and without the folder's weights."""
    classes: dict[str, tuple[Any, dict[str, Any]]] = {"local": (LocalEngine, {})}
    if importlib.util.find_spec("vllm") is not None:
        from megatron_fipo.engine.vllm_engine import VLLMEngine

        classes["vllm"] = (
            VLLMEngine,
            {
                "max_model_len": 512,
                "tensor_parallel_size": 1,
                "gpu_memory_share": 0.5,
                "deterministic": False,
            },
        )
    rows = []
    for name, (engine_class, arguments) in classes.items():
        for load_weights in (True, False):
            times = [
                _start(engine_class, folder, load_weights=load_weights, **arguments) for _ in range(STARTS)
            ]
            process, model = min(times, key=sum)
            seconds = (f"{value:.1f} s" for value in (process, model, process + model))
            rows.append((name, "loaded" if load_weights else "not read", *seconds))
    heads = ("engine", "weights of the folder", "process", "model", "both")
    return f"best of {STARTS}\n\n{table(heads, rows)}"


def _start(engine_class: Any, folder: Path, **arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    engine = start_engine(engine_class, folder, **arguments)
    ray.get(engine.status.remote())
    process = time.perf_counter()
    ray.get(engine.ready.remote())
    end = time.perf_counter()
    ray.kill(engine)
    return process - start, end - process


@contextmanager
def cluster() -> Iterator[None]:
    """Like that of a run on one machine."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=BUCKETS_IN_STORE * BUCKET_BYTES + 128 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=TABLES, help="one of the tables")
    only = options.parse_args().only
    with tempfile.TemporaryDirectory() as scratch, cluster():
        folder = write_model(Path(scratch))
        for name in [only] if only else TABLES:
            print(heading(f"load {os.getloadavg()[0]:.1f}", f"Ray {ray.__version__}"), end="\n\n")
            print(TABLES[name](folder), end="\n\n", flush=True)


TABLES = {"pushes": measure_pushes, "starts": measure_starts}


if __name__ == "__main__":
    main()
