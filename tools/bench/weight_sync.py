"""Weights into rollout engines through Ray's object store, against a plain copy of the same bytes; and how engines start.

    python tools/bench/weight_sync.py     # about five minutes; prints the tables of docs/benchmarks.md

A Qwen2-shaped model with random bfloat16 weights lies in one process, as on a trainer's rank 0, and is pushed into local engines,
which are Ray actors as in a run. Every row is measured in turn, several times over, and the best counts. The plain copy is made in
the sending process just before each push. Memory is the growth of a process during a push, sampled every 5 ms: its own pages, and
the object store's pages that it has touched.
"""

import argparse
import importlib.util
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.rollout.actors import CONTROL_CALLS
from megatron_fipo.rollout.local import LocalEngine
from megatron_fipo.rollout.weight_sync import BUCKETS_IN_STORE, push_weights

BUCKET_BYTES = 128 * 2**20
ROUNDS = 3
GB = 1e9


def write_model(folder: Path) -> Path:
    """A folder with 0.39 billion random parameters, tied embeddings, and a tokenizer with an end token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        dtype="bfloat16",
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


class Memory:
    """Growth of this process beyond what it held at the start, in bytes: its own pages, and shared ones."""

    FIELDS = ("RssAnon", "RssShmem")

    def start(self) -> None:
        self._before = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, ...]:
        self._stop.set()
        self._thread.join()
        return tuple(most - before for most, before in zip(self._most, self._before, strict=True))

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._most = tuple(map(max, self._most, self._now()))

    def _now(self) -> tuple[int, ...]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[field].split()[0]) * 1024 for field in self.FIELDS)


class Trainer:
    """Stands where the trainer's rank 0 stands: holds the weights and pushes them."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.weights = {name: tensor.clone() for name, tensor in load_file(Path(folder, "model.safetensors")).items()}
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

    def push(self, engines: dict[int, Any], version: int, check: bool) -> tuple[float, tuple[int, ...]]:
        """Seconds, and memory."""
        self.memory.start()
        start = time.perf_counter()
        push_weights(self.weights.items(), engines, version, bucket_bytes=BUCKET_BYTES, timeout_s=600.0, check=check)
        return time.perf_counter() - start, self.memory.stop()


class Engine(LocalEngine):
    """A local engine that watches its memory."""

    def watch(self) -> None:
        self.memory = Memory()
        self.memory.start()

    def watched(self) -> tuple[int, ...]:
        return self.memory.stop()


def measure_pushes(folder: Path) -> list[str]:
    """Rows: what is pushed, to how many engines, against the plain copy."""
    trainer: Any = ray.remote(Trainer).options(num_cpus=1).remote(str(folder))
    engines = {number: start_engine(Engine, folder, load_weights=False) for number in range(2)}
    ray.get([engine.ready.remote() for engine in engines.values()])
    size, count = ray.get(trainer.size.remote())
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    copies: list[float] = []
    for version in range(1, ROUNDS + 1):
        for engine_count, check in [(1, False), (1, True), (2, False), (2, True)]:
            chosen = {number: engines[number] for number in range(engine_count)}
            copies.append(ray.get(trainer.copy.remote()))
            ray.get([engine.watch.remote() for engine in chosen.values()])
            seconds, memory = ray.get(trainer.push.remote(chosen, version, check))
            engine_memory = ray.get(engines[0].watched.remote())
            ray.get([engine.watched.remote() for number, engine in chosen.items() if number])
            new = {"seconds": seconds, "trainer": memory, "engine": engine_memory}
            old = found.setdefault((engine_count, check), new)
            if seconds < old["seconds"]:
                found[engine_count, check] = new
    for actor in (trainer, *engines.values()):
        ray.kill(actor)
    copy = min(copies)
    lines = [
        f"{size / GB:.2f} GB in {count} tensors, buckets of {BUCKET_BYTES // 2**20} MiB",
        "",
        "| | time | per GB | time / copy | trainer's own memory | engine's own memory | object store touched |",
        "|---|---|---|---|---|---|---|",
        f"| plain copy, one thread | {copy:.2f} s | {copy / size * GB:.2f} s | 1.0 | | | |",
    ]
    for (engine_count, check), row in found.items():
        lines.append(
            f"| push to {engine_count} engine{'s' * (engine_count > 1)}, {'with' if check else 'without'} check "
            f"| {row['seconds']:.2f} s | {row['seconds'] / size * GB:.2f} s | {row['seconds'] / copy:.1f} "
            f"| +{row['trainer'][0] / 2**20:,.0f} MiB | +{row['engine'][0] / 2**20:,.0f} MiB | {row['trainer'][1] / 2**20:,.0f} MiB |"
        )
    return lines


def start_engine(engine_class: Any, folder: Path, **arguments: Any) -> Any:
    options = {"num_cpus": 1, "max_concurrency": engine_class.calls_at_once + CONTROL_CALLS}
    return ray.remote(engine_class).options(**options).remote(str(folder), "bfloat16", **arguments)


def measure_starts(folder: Path) -> list[str]:
    """Rows: seconds until an engine's process answers, and until its model is there, with and without the folder's weights."""
    classes: dict[str, tuple[Any, dict[str, Any]]] = {"local": (LocalEngine, {})}
    if importlib.util.find_spec("vllm") is not None:
        from megatron_fipo.rollout.vllm_engine import VLLMEngine

        classes["vllm"] = (
            VLLMEngine,
            {"max_model_len": 512, "tensor_parallel_size": 1, "gpu_memory_share": 0.5, "deterministic": False},
        )
    lines = ["| engine | weights of the folder | process | model | both |", "|---|---|---|---|---|"]
    for name, (engine_class, arguments) in classes.items():
        for load_weights in (True, False):
            times = [_start(engine_class, folder, load_weights=load_weights, **arguments) for _ in range(ROUNDS)]
            process, model = min(times, key=sum)
            lines.append(
                f"| {name} | {'loaded' if load_weights else 'not read'} | {process:.1f} s | {model:.1f} s | {process + model:.1f} s |"
            )
    return lines


def _start(engine_class: Any, folder: Path, **arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    engine = start_engine(engine_class, folder, **arguments)
    ray.get(engine.ping.remote())
    process = time.perf_counter()
    ray.get(engine.ready.remote())
    end = time.perf_counter()
    ray.kill(engine)
    return process - start, end - process


def _machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ": ?")
    return (
        f"{model.split(':')[1].strip()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.system()}, "
        f"torch {torch.__version__}, Ray {ray.__version__}"
    )


@contextmanager
def cluster() -> Iterator[None]:
    """As a run on one machine makes it."""
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=BUCKETS_IN_STORE * BUCKET_BYTES + 128 * 2**20,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{date.today()}, {_machine()}, best of {ROUNDS}\n")
    with tempfile.TemporaryDirectory() as scratch, cluster():
        folder = write_model(Path(scratch))
        print(*measure_pushes(folder), sep="\n", end="\n\n")
        print(*measure_starts(folder), sep="\n")


if __name__ == "__main__":
    main()
