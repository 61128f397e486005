"""A stop-watch for GPUs. On a CPU (rehearsal) the same calls take wall-clock time of a few runs."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CACHE_MULTIPLE = 2.0
"""Input sets that a small kernel rotates through are this many times as the L2 cache, so that it reads memory."""
MOST_SETS = 256


@dataclass(frozen=True)
class Bench:
    """Where and how large: what every case is given."""

    device: torch.device
    rehearsal: bool
    output: Path

    def pick(self, full, toy):
        """`full` on a GPU, `toy` in a rehearsal."""
        return toy if self.rehearsal else full

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    lowest: float
    highest: float
    captured: bool = False
    """Replayed from a CUDA graph: without the host's launches."""

    def figures(self, name: str) -> dict[str, float | str]:
        return {
            f"{name}_seconds": self.median,
            f"{name}_seconds_lowest": self.lowest,
            f"{name}_seconds_highest": self.highest,
            f"{name}_in_cuda_graph": str(self.captured),
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory did not suffice; libraries below torch say so in their own words."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "ALLOC_FAILED" in str(error)
        or "out of memory" in str(error)
    )


def synchronize(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.synchronize()


def release(bench: Bench) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()


def time_calls(bench: Bench, call: Callable[[], object], repeat: int = 20, warm_up: int = 3) -> Timing:
    """As the training loop would call it: launched by the host one after the other, between two events each."""
    repeat, warm_up = bench.pick((repeat, warm_up), (1, 1))
    for _ in range(warm_up):
        call()
    synchronize(bench)
    return _summary([_one(bench, call) for _ in range(repeat)])


def time_small(bench: Bench, calls: Sequence[Callable[[], object]], replays: int = 20) -> Timing:
    """GPU time per call of calls so short that launching them would dwarf them: all of them in one CUDA graph, replayed.

    Give one call per input set (`sets_for`), so that none finds its input in the cache. What calls return is kept until all are
    captured, so that outputs are distinct memory too. Where a call cannot be captured, it is timed as `time_calls` does, and
    `captured` says so.
    """
    if not bench.on_gpu:
        return time_calls(bench, calls[0])
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {error}")
        torch.cuda.set_stream(usual)  # torch leaves the capturing one current
        torch.cuda.synchronize()
        return time_calls(bench, calls[0])
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    seconds = [_one(bench, graph.replay) / len(calls) for _ in range(replays)]
    del kept
    return _summary(seconds, captured=True)


def sets_for(bench: Bench, bytes_per_set: int) -> int:
    """How many input sets overflow the L2 cache."""
    if not bench.on_gpu:
        return 1
    cache = getattr(torch.cuda.get_device_properties(bench.device), "L2_cache_size", 0) or 64 * 2**20
    return int(min(max(CACHE_MULTIPLE * cache // max(bytes_per_set, 1) + 1, 4), MOST_SETS))


def peak_extra(bench: Bench, call: Callable[[], object]) -> int:
    """Bytes of GPU memory that a call (a warm one) needs at its peak beyond what was allocated before, its result included."""
    if not bench.on_gpu:
        call()
        return 0
    call()
    release(bench)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def _one(bench: Bench, call: Callable[[], object]) -> float:
    if not bench.on_gpu:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _summary(seconds: Sequence[float], captured: bool = False) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), captured)
