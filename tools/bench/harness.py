"""How every benchmark measures: in a process of its own, time as median and range, peak memory, and the machine's name.

Benchmarks of the CPU use `in_own_process`, `peak_of`, `best_seconds`; those of a GPU (`gpu_*.py`) use the `Bench` and the timers
below, which in a rehearsal on the CPU take the wall-clock time of a few runs.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench.report import FAILED, SKIPPED, Row, reason

ROOT = Path(__file__).resolve().parents[2]
CACHE_MULTIPLE = 2.0
"""Input sets that a small kernel rotates through are this many times as large as the L2 cache, so that it reads memory."""
MOST_SETS = 256
ROWS_FILE = "GPU_CHECK_ROWS"
"""Environment variable: the file to which a process of the GPU check appends its messages, one JSON object per line."""
REHEARSAL = "TRITON_INTERPRET"
"""Environment variable: 1 means toy sizes on the CPU, kernels in Triton's interpreter."""


# -- any benchmark


def heading(*details: str) -> str:
    """Date, processor, cores, system, version of torch, and details: the line above a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    machine = f"{model}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"
    return ", ".join([time.strftime("%Y-%m-%d"), machine, *details])


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measurement(run: Callable[..., dict[str, float]], arguments: Sequence[str] | None) -> bool:
    """The child's part of `in_own_process`: if there are arguments, call `run` with them and print its result as JSON."""
    if arguments:
        print(json.dumps(run(*arguments)))
    return bool(arguments)


def in_own_process(module: str, *arguments: object, threads: int | None = 1) -> dict[str, float]:
    """The result of `python -m module --measure arguments…`; threads: limit of torch's threads there, None for all cores."""
    command = [sys.executable, "-m", module, "--measure", *map(str, arguments)]
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT)
    return json.loads(done.stdout)


def resident(field: str) -> int:
    """A size from /proc/self/status, in bytes: `VmRSS` is memory now, `RssAnon` its private part, `VmHWM` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_of(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result and seconds of a call, and bytes of the process's peak resident set during it beyond that before it."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, seconds, resident("VmHWM") - before


def best_seconds(call: Callable[[], object], repeat: int) -> float:
    """The shortest of some calls."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


# -- benchmarks and tests of a GPU


@dataclass(frozen=True)
class Bench:
    """Where and how large: given to every case."""

    device: torch.device

    def pick(self, full, toy):
        """`full` on a GPU, `toy` in a rehearsal on the CPU."""
        return full if self.on_gpu else toy

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def open_bench() -> Bench:
    """The first GPU, or in a rehearsal the CPU, prepared for measuring."""
    if os.environ.get(REHEARSAL) == "1":
        from tests.gpu.interpreter import fix_interpreter

        fix_interpreter()
        torch.set_num_threads(1)
        return Bench(torch.device("cpu"))
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is the reference
    return Bench(torch.device("cuda", 0))


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


def summary(seconds: Sequence[float], captured: bool = False) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), captured)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory did not suffice; libraries below torch have messages of their own for it."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "ALLOC_FAILED" in str(error)
        or "out of memory" in str(error)
    )


def synchronize(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.synchronize()


def release(bench: Bench) -> None:
    """Give back all memory that nothing refers to."""
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()


def time_calls(bench: Bench, call: Callable[[], object], repeat: int = 20, warm_up: int = 3) -> Timing:
    """As the training loop would call it: launched by the host one after the other, between two events each."""
    repeat, warm_up = bench.pick((repeat, warm_up), (1, 1))
    for _ in range(warm_up):
        call()
    synchronize(bench)
    return summary([_one(bench, call) for _ in range(repeat)])


def time_small(bench: Bench, calls: Sequence[Callable[[], object]], replays: int = 20) -> Timing:
    """GPU time per call of calls so short that their launches would dominate: all of them in one CUDA graph, replayed.

    Give one call per input set (`sets_for`), so that none finds its input in the cache. What calls return is kept until all are
    captured, so that outputs are distinct memory too. A call that cannot be captured is timed as `time_calls` does;
    `captured` is then False.
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
    return summary(seconds, captured=True)


def sets_for(bench: Bench, bytes_per_set: int) -> int:
    """How many input sets overflow the L2 cache."""
    if not bench.on_gpu:
        return 1
    cache = getattr(torch.cuda.get_device_properties(bench.device), "L2_cache_size", 0) or 64 * 2**20
    return int(min(max(CACHE_MULTIPLE * cache // max(bytes_per_set, 1) + 1, 4), MOST_SETS))


def peak_extra(bench: Bench, call: Callable[[], object]) -> int:
    """Peak bytes of GPU memory of a call (a warm one) beyond those allocated before it, its result included."""
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


# -- a benchmark of a GPU as a script, and as a section of the GPU check

Case = Callable[[Bench], Iterator[Row]]
Cases = Mapping[str, Case]


def send(**message: Any) -> None:
    """A message to the GPU check, if it runs this process: `cases=[…]`, `begin=CASE`, `row={…}` or `end=CASE`."""
    if path := os.environ.get(ROWS_FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")


def run_cases(description: str | None, section: str, cases: Cases) -> None:
    """The command line of a GPU benchmark: prints a line per row. A case that fails costs its own remaining rows only."""
    options = parser(description)
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases)} (default: all)")
    arguments = options.parse_args()
    if unknown := [name for name in arguments.cases if name not in cases]:
        options.error(f"no case {unknown[0]!r}; there are {', '.join(cases)}")
    chosen = arguments.cases or list(cases)
    send(cases=chosen)
    bench = open_bench()
    for name in chosen:
        send(begin=name)
        for row in guarded(section, name, lambda name=name: cases[name](bench)):
            print(f"{row.name}: {row.result} ({row.verdict})", flush=True)
            send(row=asdict(row))
        release(bench)
        synchronize(bench)  # raises if the case broke the device
        send(end=name)


def guarded(section: str, name: str, case: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows of a case; an exception becomes its last row."""
    try:
        yield from case()
    except ModuleNotFoundError as error:
        yield reason(SKIPPED, section, name, f"{error.name} is not installed", False)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        if is_out_of_memory(error):
            yield reason(SKIPPED, section, name, f"out of memory: {error}", False)
            return
        wrong = isinstance(error, AssertionError)  # a benchmarked method with wrong results
        yield reason(FAILED, section, name, f"{type(error).__name__}: {error}", wrong)
