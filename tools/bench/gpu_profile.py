"""What a step's time goes to, by kind and kernel by kernel, and where the host waits for the device. A case of `gpu_step`."""

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_fipo.config import ModelConfig
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape
from tools.bench.gpu_models import LR, OBJECTIVE, WARM_UP, packs
from tools.bench.harness import Bench, synchronize
from tools.bench.report import FIGURE, SKIPPED, Row, duration, reason
from tools.bench.trace import OTHER, STEP, Summary, summarize

SECTION = "step"
PROFILE = Path(os.environ.get("GPU_CHECK_OUTPUT", ".")) / "step_profile.txt"


def profile_steps(
    bench: Bench, policy: RankModel, shape: Shape, model: ModelConfig, name: str
) -> Iterator[Row]:
    """A step's time by kind as rows, kernel by kernel into a file. Last, because a profiler affects later timings."""
    order = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    with PROFILE.open("w", encoding="utf-8") as file:
        for pack, shards in packs(bench, policy, shape, model):

            def step(shards=shards) -> None:
                policy.policy_step(shards, OBJECTIVE, LR)

            for _ in range(WARM_UP):
                step()
            waits = waits_of(bench, step)
            recorded = record(bench, step)
            table = recorded.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=100)
            title = f"{name}, {pack}, recompute {model.recompute}"
            file.write(f"=== {title}\n{table}\n")
            found = summarize(trace_of(recorded))
            yield from rows_by_kind(f"profile of {name}, {pack}", found)
            yield wait_row(bench, f"host waits of {name}, {pack}", found, waits)
    yield Row(SECTION, f"profile of {name}", FIGURE, f"in {PROFILE.name}")


def record(bench: Bench, step: Callable[[], object]) -> profile:
    """A step, and the wait for its end, as `trace.STEP`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    synchronize(bench)
    with profile(activities=activities) as recorded, record_function(STEP):
        step()
        synchronize(bench)
    return recorded


def trace_of(recorded: profile) -> list[dict[str, Any]]:
    """The events of the trace that it exports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def rows_by_kind(title: str, found: Summary) -> Iterator[Row]:
    """One row per kind of work, the longest first."""
    for kind, seconds in found.by_kind.items():
        share = 100 * seconds / found.seconds
        result = f"{duration(seconds)}, {share:.1f} % of {duration(found.seconds)}"
        if kind == OTHER:
            result += f": {', '.join(label[:60] for label in found.other)}"
        figures = {"seconds": seconds, "step_seconds": found.seconds}
        yield Row(SECTION, f"{title}: {kind}", FIGURE, result, figures)


def wait_row(bench: Bench, title: str, found: Summary, waits: Counter[str]) -> Row:
    """Waits that torch's operations made by Python line, and all calls that wait, by name, from the profiler."""
    if not bench.on_gpu:
        return reason(SKIPPED, SECTION, title, "the host waits for a device on a GPU only", False)
    by_line = ", ".join(f"{count} at {where}" for where, count in waits.most_common())
    by_call = ", ".join(f"{count} {name}" for name, count in found.waits.items())
    result = f"{waits.total()} by torch's operations ({by_line or 'none'}); calls: {by_call or 'none'}"
    return Row(SECTION, title, FIGURE, result, {"host_waits": waits.total(), **found.waits, **waits})


def waits_of(bench: Bench, call: Callable[[], object]) -> Counter[str]:
    """How often the host waits for the device in operations of torch, by `file:line`. None on a CPU."""
    if not bench.on_gpu:
        call()
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing CUDA operation" in str(warning.message)
    )
