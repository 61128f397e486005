"""The checksum of weights against sha256 and a plain copy of the same bytes, on one CPU thread.

    python -m tools.bench.checksum        # about half a minute; prints the table of docs/benchmarks.md

The tensors are those of some layers of a Qwen2-shaped model in bfloat16. All rows are measured in turn, several times, in
one process: time of the thread on the CPU, so that other processes count less.
"""

import hashlib
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.weight_sync.checksum import MULTIPLIERS, Checksums, as_bytes, device_sums
from tools.bench.harness import heading, in_own_process, measurement, parser, table

LAYERS, HIDDEN, INTERMEDIATE, ROUNDS = 8, 2048, 8192, 15
WORDS_PER_ROW = MULTIPLIERS.shape[1]


def weights() -> dict[str, Tensor]:
    """0.65 GB in 40 tensors."""
    shapes = {
        "qkv": (3 * HIDDEN, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate_up": (2 * INTERMEDIATE, HIDDEN // 2),
        "down": (HIDDEN // 2, INTERMEDIATE),
        "norm": (HIDDEN,),
    }
    return {
        f"{layer}.{name}": torch.randn(shape, dtype=torch.bfloat16)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


def rows_of(tensor: Tensor) -> Tensor:
    """Complete rows of words."""
    data = as_bytes(tensor)
    return (
        data[: len(data) // (8 * WORDS_PER_ROW) * 8 * WORDS_PER_ROW].view(torch.int64).view(-1, WORDS_PER_ROW)
    )


def methods(tensors: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """By row of the table; a call reads every tensor once."""
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    multipliers = torch.from_numpy(MULTIPLIERS)

    def copy() -> None:
        for name, tensor in tensors.items():
            target[name].copy_(tensor)

    def clone() -> None:
        for tensor in tensors.values():
            tensor.clone()

    def sha256() -> None:
        for tensor in tensors.values():
            hashlib.sha256(as_bytes(tensor).numpy().data).digest()

    def checksum() -> None:
        checksums = Checksums()
        for name, tensor in tensors.items():
            checksums.add(name, tensor)
        checksums.finish()

    def products() -> None:
        for tensor in tensors.values():
            device_sums(rows_of(tensor), multipliers)

    def one_sum(product: Callable[[np.ndarray, np.ndarray], object]) -> Callable[[], None]:
        def run() -> None:
            for tensor in tensors.values():
                product(rows_of(tensor).numpy(), MULTIPLIERS[0])

        return run

    def mv() -> None:
        for tensor in tensors.values():
            torch.mv(rows_of(tensor), multipliers[0])

    return {
        "copy_ to memory written before": copy,
        "clone, to new memory": clone,
        "sha256": sha256,
        "checksum": checksum,
        "both sums by torch, as on a GPU": products,
        "one sum by numpy.einsum": one_sum(lambda words, m: np.einsum("rw,w->r", words, m)),
        "one sum by numpy.dot": one_sum(np.dot),
        "one sum by torch.mv": mv,
    }


def measure(rounds: str) -> dict[str, float]:
    """Seconds of each method, shortest and median, and the size."""
    torch.set_num_threads(1)
    tensors = weights()
    calls = methods(tensors)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(int(rounds)):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    found = {
        f"{name}|{kind}": pick(times)
        for name, times in seconds.items()
        for kind, pick in (("best", min), ("median", statistics.median))
    }
    return found | {"bytes": float(sum(tensor.nbytes for tensor in tensors.values()))}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--measure", nargs="*", help="for this script's own process")
    if measurement(measure, options.parse_args().measure):
        return
    found = in_own_process("tools.bench.checksum", ROUNDS)
    size = found.pop("bytes")
    names = list(dict.fromkeys(key.split("|")[0] for key in found))
    copy = {kind: found[f"{names[0]}|{kind}"] for kind in ("best", "median")}
    rows = [
        (
            name,
            f"{found[f'{name}|best'] * 1e3:.0f} ms",
            f"{size / found[f'{name}|best'] / 1e9:.1f} GB/s",
            *(f"{found[f'{name}|{kind}'] / copy[kind]:.2f}" for kind in ("best", "median")),
        )
        for name in names
    ]
    print(heading(f"numpy {np.__version__}", f"load {os.getloadavg()[0]:.1f}"), end="\n\n")
    print(f"{size / 1e9:.2f} GB, one thread, {ROUNDS} rounds\n")
    print(table(("", "time", "rate", "time / copy_, best", "time / copy_, median"), rows))


if __name__ == "__main__":
    main()
