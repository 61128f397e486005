"""What a step's time went to, from the trace that torch's profiler exports. Pure.

On a GPU work is what the device does; when it does nothing it is idle. On a CPU work is the time of each operation outside of
others. Work is assigned by the operations that launched it and by its own name: the head's products are the head's.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEP = "measured step"
"""The annotation around what is measured; it must end after the device has finished."""
IDLE = "idle"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "user_annotation")
LAUNCH = ("cuda_runtime", "cuda_driver")
BLOCKING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls in which the host waits for the device."""

KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "optimizer": (("optimizer.step", "fusedadam"), ("multi_tensor", "adam")),
    "head": (("_logprobandentropy",), (r"\bstatistics_kernel", r"\bgradient_kernel")),
    "loss": (
        ("_tritonpolicyloss",),
        ("loss_blocks_kernel", "loss_rows_kernel", "scan_", "chunk_sums_kernel"),
    ),
    "attention": (
        ("fusedattn", "flashattn", "scaled_dot_product"),
        ("sdpa", "fmha", "flash", "attention", "thd_"),
    ),
    "FP8 casts": (("quantize", "fp8"), ("quantize", "amax_kernel", "blockwise", "cast_transpose")),
    "GEMM": (
        ("aten::mm", "aten::addmm", "aten::bmm"),
        ("gemm", "nvjet", "cutlass", "splitk", "aten::mm", "addmm", "bmm", "matmul"),
    ),
    "copies": (
        (),
        ("memcpy", "memset", "copy", "fill", "catarray", "zero_", "aten::cat", "_to_copy", "clone"),
    ),
    "norm, activation, residual": (
        ("norm", "swiglu", "silu", "rotary", "rope", "dropout"),
        (
            "norm",
            "swiglu",
            "silu",
            "rope",
            "rotary",
            "dropout",
            "triton_",
            "elementwise",
            "aten::mul",
            "aten::add",
        ),
    ),
}
"""By kind, in order: patterns of names of operations around the work, and of the work itself; lower case."""
OTHER = "other"


@dataclass(frozen=True)
class Work:
    """A kernel, a copy, or on a CPU an operation's own time."""

    name: str
    around: tuple[str, ...]
    """The operations that launched it, from the outermost."""
    start: float
    """Microseconds of the trace."""
    end: float
    own: float
    """Microseconds that count for it."""


def kind_of(work: Work) -> str:
    """The first kind that matches."""
    name, around = work.name.lower(), " ".join(work.around).lower()
    for kind, (outer, own) in KINDS.items():
        if any(re.search(each, around) for each in outer) or any(re.search(each, name) for each in own):
            return kind
    return OTHER


@dataclass(frozen=True)
class Summary:
    """Of one step."""

    seconds: float
    by_kind: dict[str, float]
    """Seconds by kind, idle time included; kinds that took none are absent."""
    other: list[str]
    """Names of the largest works of no kind, the largest first."""
    waits: dict[str, int]
    """Calls in which the host waited, by name; without the one that ends the measurement."""


def summarize(events: Sequence[dict[str, Any]]) -> Summary:
    """ValueError if the trace has no step."""
    spans = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in spans if event.get("cat") == "user_annotation" and event["name"] == STEP]
    if len(marks) != 1:
        raise ValueError(f"the trace has {len(marks)} steps")
    start, end = _interval(marks[0])
    inside = [event for event in spans if start <= event["ts"] < end and event["name"] != STEP]
    on_gpu = any(event.get("cat") in DEVICE for event in inside)
    works = device_work(inside) if on_gpu else host_work(inside)
    by_kind: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for work in works:
        kind = kind_of(work)
        by_kind[kind] += work.own / 1e6
        if kind == OTHER:
            others[work.name] += work.own
    busy = busy_time((work.start, work.end) for work in works)
    by_kind[IDLE] = max(0.0, (end - start - busy) / 1e6)
    waits: dict[str, int] = defaultdict(int)
    for event in inside:
        if event.get("cat") in LAUNCH and event["name"] in BLOCKING:
            waits[event["name"]] += 1
    if waits.get("cudaDeviceSynchronize"):
        waits["cudaDeviceSynchronize"] -= 1
    return Summary(
        seconds=(end - start) / 1e6,
        by_kind=dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        other=sorted(others, key=lambda name: -others[name])[:3],
        waits={name: count for name, count in waits.items() if count},
    )


def device_work(events: Sequence[dict[str, Any]]) -> list[Work]:
    """Kernels and copies, each with the operations around its launch (same thread, found by its correlation)."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCH and "correlation" in event.get("args", {})
    }
    parents = _parents(events)
    works = []
    for event in events:
        if event.get("cat") in DEVICE:
            start, end = _interval(event)
            launch = launches.get(event.get("args", {}).get("correlation"))
            outer = _names(launch, parents) if launch is not None else ()
            works.append(Work(event["name"], outer, start, end, end - start))
    return works


def host_work(events: Sequence[dict[str, Any]]) -> list[Work]:
    """Operations with the time that they do not spend in others."""
    parents = _parents(events)
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    own = {id(event): float(event["dur"]) for event in operations}
    for event in operations:
        parent = parents.get(id(event))
        while parent is not None and id(parent) not in own:  # an annotation
            parent = parents.get(id(parent))
        if parent is not None:
            own[id(parent)] -= float(event["dur"])
    return [
        Work(event["name"], _names(event, parents), *_interval(event), max(0.0, own[id(event)]))
        for event in operations
    ]


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _parents(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By identity of an operation or a launch, the operation directly around it on its thread."""
    threads: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in HOST + LAUNCH:
            threads[event["pid"], event["tid"]].append(event)
    parents = {}
    for spans in threads.values():
        open_spans: list[dict[str, Any]] = []
        for event in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
            while open_spans and _interval(open_spans[-1])[1] <= event["ts"]:
                open_spans.pop()
            if open_spans:
                parents[id(event)] = open_spans[-1]
            if event["cat"] in HOST:
                open_spans.append(event)
    return parents


def _names(event: dict[str, Any], parents: Mapping[int, dict[str, Any]]) -> tuple[str, ...]:
    """Of the operations around it, from the outermost."""
    names: list[str] = []
    outer = parents.get(id(event))
    while outer is not None:
        names.append(outer["name"])
        outer = parents.get(id(outer))
    return tuple(reversed(names))


def _interval(event: dict[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
