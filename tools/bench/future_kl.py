"""FutureKL: this project's scan against the published quadratic listing and a serial loop. One CPU thread, float32.

    python tools/bench/future_kl.py            # about two minutes; prints the tables of docs/benchmarks.md

Every measurement runs in a process of its own. Time is the best of a few calls. Memory is what the process's resident set
peaked at during its first call (VmHWM, reset just before) beyond what it held before, so inputs and index tables are not in it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine, resident
from torch import Tensor

BATCH, HALF_LIFE = 8, 32.0
LENGTHS = (1_280, 2_560, 5_120, 10_240, 20_480, 40_960, 81_920)
QUADRATIC_LIMIT = 20_480
"""The listing keeps 4·L² bytes for a backward: 1.6 GiB here, 6.3 GiB at twice and 25 GiB at four times the length."""


def quadratic_listing(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The published computation: 128 columns at a time, a dense [L, 128] decay block each, its input still in the graph."""
    length, chunk = log_ratio.shape[1], 128
    masked, gamma = log_ratio * mask, 2.0 ** (-1.0 / HALF_LIFE)
    future_kl = torch.zeros_like(log_ratio)
    row = torch.arange(length).unsqueeze(1)
    for start in range(0, length, chunk):
        column = torch.arange(start, min(start + chunk, length)).unsqueeze(0)
        distance = column - row
        decay = torch.pow(gamma, distance.clamp(min=0)) * (distance >= 0)
        future_kl = future_kl + masked[:, start : start + chunk] @ decay.to(masked.dtype).T
    return future_kl


def serial_loop(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """F_t = x_t + γ·F_{t+1}, one position after the other, for the whole batch at once and without a graph."""
    x, gamma = (log_ratio.detach() * mask), 2.0 ** (-1.0 / HALF_LIFE)
    future_kl = torch.empty_like(x)
    carry = torch.zeros(len(x))
    for t in range(x.shape[1] - 1, -1, -1):
        carry = x[:, t] + gamma * carry
        future_kl[:, t] = carry
    return future_kl


def scan(log_ratio: Tensor, mask: Tensor) -> Tensor:
    from megatron_fipo import future_kl

    return future_kl(log_ratio, mask, HALF_LIFE)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scan": scan,
    "serial": serial_loop,
    "quadratic": quadratic_listing,
}


def measure(method: str, length: int) -> dict[str, float]:
    """Seconds and bytes of one call at [BATCH, length], in this process."""
    torch.set_num_threads(1)
    function = METHODS[method]
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(BATCH, length, generator=generator).mul_(0.05).requires_grad_()
    mask = torch.ones(BATCH, length)
    warm = log_ratio[:, :256].detach().requires_grad_()
    function(warm, mask[:, :256])
    if method == "scan":
        from megatron_fipo.objective.padded import _rectangle

        _rectangle(BATCH, length, log_ratio.device)  # index tables belong to packing, not to the step
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = function(log_ratio, mask)
    peak = resident("VmHWM") - before
    error = (
        (result.detach() - serial_loop(log_ratio.double(), mask.double())).abs().max().item()
        if length <= 20_480
        else 0.0
    )
    del result
    best = math.inf
    for _ in range(2 if method == "quadratic" else 3 if method == "serial" else 50):
        start = time.perf_counter()
        function(log_ratio, mask)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "bytes": peak, "error": error}


def exponent(times: dict[int, float]) -> float:
    """Least-squares slope of log seconds over log length."""
    points = torch.tensor(
        [[math.log(length), math.log(seconds)] for length, seconds in times.items()], dtype=torch.float64
    )
    centred = points - points.mean(0)
    return float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())


def _communicating_rank(rank: int, cp: int, length: int, store: str, queue: "mp.SimpleQueue") -> None:
    """Bytes that one zigzag rank puts into collectives for one micro-batch of BATCH sequences."""
    import numpy as np

    from megatron_fipo.objective.future_kl import scan_future_kl
    from megatron_fipo.objective.scan_layout import ChunkTable, build_scan_plan

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=cp)
    size = length // (2 * cp)
    chunk = np.stack([np.arange(cp), 2 * cp - 1 - np.arange(cp)], axis=1)
    first = np.broadcast_to(chunk[:, None, :] * size, (cp, BATCH, 2))
    table = ChunkTable(first, np.full_like(first, size))
    position = np.tile((first[rank, 0][:, None] + np.arange(size)).ravel(), BATCH)
    plan = build_scan_plan(table, rank, np.repeat(np.arange(BATCH), 2 * size), position)
    rows = torch.zeros(plan.num_rows)
    with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as all_gather:
        scan_future_kl(rows, torch.zeros(plan.num_rows, 2), plan, HALF_LIFE, dist.group.WORLD)
    if rank == 0:
        queue.put([call.args[1].nbytes for call in all_gather.call_args_list])
    dist.barrier()
    dist.destroy_process_group()


def communication(cp: int, length: int) -> list[int]:
    """Bytes of every collective call of rank 0."""
    store = f"/tmp/future_kl_bench_{os.getpid()}_{cp}_{length}"
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_communicating_rank, args=(cp, length, store, queue), nprocs=cp)
    Path(store).unlink(missing_ok=True)
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "LENGTH"), help="one measurement, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    print(
        f"{date.today()}, {describe_machine()}, one thread, B = {BATCH}, half life {HALF_LIFE:.0f}, float32\n"
    )
    print(
        "| L | quadratic / scan time | quadratic / scan memory | serial / scan time | scan | scan memory | serial | quadratic |"
    )
    print("|---|---|---|---|---|---|---|---|")
    times: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for length in LENGTHS:
        found = {
            m: _in_own_process(m, length) for m in METHODS if m != "quadratic" or length <= QUADRATIC_LIMIT
        }
        for method, values in found.items():
            times[method][length] = values["seconds"]
        print(_row(length, found), flush=True)
    print(
        "\nExponent of time in L: "
        + ", ".join(f"{method} {exponent(values):.2f}" for method, values in times.items())
    )
    print("\n| L | cp 1 | cp 2 | cp 4 |\n|---|---|---|---|")
    for length in (1_280, 20_480, 81_920):
        print(f"| {length:,} | " + " | ".join(_bytes(communication(cp, length)) for cp in (1, 2, 4)) + " |")


def _bytes(calls: list[int]) -> str:
    return " + ".join(f"{count} bytes" for count in calls)


def _in_own_process(method: str, length: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", method, str(length)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    )


def _row(length: int, found: dict[str, dict[str, float]]) -> str:
    ours, quadratic = found["scan"], found.get("quadratic")
    milliseconds = {method: f"{1e3 * values['seconds']:,.2f} ms" for method, values in found.items()}
    ratio = f"{quadratic['seconds'] / ours['seconds']:,.0f}" if quadratic else "–"
    memory = f"{quadratic['bytes'] / max(ours['bytes'], 1):,.0f}" if quadratic else "–"
    serial = f"{found['serial']['seconds'] / ours['seconds']:,.0f}"
    cells = [f"{length:,}", ratio, memory, serial, milliseconds["scan"], f"{ours['bytes'] / 2**20:,.1f} MiB"]
    return "| " + " | ".join([*cells, milliseconds["serial"], milliseconds.get("quadratic", "–")]) + " |"


if __name__ == "__main__":
    main()
