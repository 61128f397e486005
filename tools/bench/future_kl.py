"""FutureKL: this project's scan against the published quadratic listing and a serial loop. One CPU thread, float32.

    python -m tools.bench.future_kl            # about two minutes; prints the tables of docs/benchmarks.md

Every measurement runs in a process of its own. Time is the best of a few calls. Memory is the peak of the process's resident
set during its first call beyond that before it, so it excludes inputs and index tables.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tools.bench.harness import best_seconds, heading, in_own_process, measurement, parser, peak_of, table

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
    """F_t = x_t + γ·F_{t+1}, one position after the other, for the complete batch at once and without a graph."""
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


def measure(method: str, tokens: str) -> dict[str, float]:
    """Seconds and bytes of one call at [BATCH, tokens], in this process."""
    torch.set_num_threads(1)
    function, length = METHODS[method], int(tokens)
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(BATCH, length, generator=generator).mul_(0.05).requires_grad_()
    mask = torch.ones(BATCH, length)
    warm = log_ratio[:, :256].detach().requires_grad_()
    function(warm, mask[:, :256])
    if method == "scan":
        from megatron_fipo.objective.padded import _rectangle

        _rectangle(BATCH, length, log_ratio.device)  # index tables belong to packing, not to the step
    result, _, peak = peak_of(lambda: function(log_ratio, mask))
    error = 0.0
    if length <= 20_480:
        truth = serial_loop(log_ratio.double(), mask.double())
        error = (result.detach() - truth).abs().max().item()
    del result
    best = best_seconds(lambda: function(log_ratio, mask), {"quadratic": 2, "serial": 3, "scan": 50}[method])
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
    from megatron_fipo.objective.scan_layout import ALL_GATHER, ChunkTable, build_scan_plan

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=cp)
    size = length // (2 * cp)
    chunk = np.stack([np.arange(cp), 2 * cp - 1 - np.arange(cp)], axis=1)
    first = np.broadcast_to(chunk[:, None, :] * size, (cp, BATCH, 2))
    table = ChunkTable(first, np.full_like(first, size))
    position = np.tile((first[rank, 0][:, None] + np.arange(size)).ravel(), BATCH)
    plan = build_scan_plan(table, rank, np.repeat(np.arange(BATCH), 2 * size), position)
    rows = torch.zeros(plan.num_rows)
    with mock.patch.object(dist, ALL_GATHER, wraps=getattr(dist, ALL_GATHER)) as all_gather:
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
    options = parser(__doc__)
    options.add_argument("--measure", nargs=2, metavar=("METHOD", "LENGTH"), help="one measurement, as JSON")
    if measurement(measure, options.parse_args().measure):
        return
    print(heading("one thread", f"B = {BATCH}", f"half life {HALF_LIFE:.0f}", "float32") + "\n")
    times: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    rows = []
    for length in LENGTHS:
        methods = [m for m in METHODS if m != "quadratic" or length <= QUADRATIC_LIMIT]
        found = {m: in_own_process("tools.bench.future_kl", m, length) for m in methods}
        for method, values in found.items():
            times[method][length] = values["seconds"]
        rows.append(_row(length, found))
    heads = ("L", "quadratic / scan time", "quadratic / scan memory", "serial / scan time")
    print(table((*heads, "scan", "scan memory", "serial", "quadratic"), rows))
    exponents = ", ".join(f"{method} {exponent(values):.2f}" for method, values in times.items())
    print(f"\nExponent of time in L: {exponents}\n")
    sizes = (1, 2, 4)
    rows = [
        (f"{length:,}", *(_bytes(communication(cp, length)) for cp in sizes))
        for length in (1_280, 20_480, 81_920)
    ]
    print(table(("L", *(f"cp {cp}" for cp in sizes)), rows))


def _bytes(calls: list[int]) -> str:
    return " + ".join(f"{count} bytes" for count in calls)


def _row(length: int, found: dict[str, dict[str, float]]) -> tuple[str, ...]:
    ours, quadratic = found["scan"], found.get("quadratic")
    milliseconds = {method: f"{1e3 * values['seconds']:,.2f} ms" for method, values in found.items()}
    return (
        f"{length:,}",
        f"{quadratic['seconds'] / ours['seconds']:,.0f}" if quadratic else "–",
        f"{quadratic['bytes'] / max(ours['bytes'], 1):,.0f}" if quadratic else "–",
        f"{found['serial']['seconds'] / ours['seconds']:,.0f}",
        milliseconds["scan"],
        f"{ours['bytes'] / 2**20:,.1f} MiB",
        milliseconds["serial"],
        milliseconds.get("quadratic", "–"),
    )


if __name__ == "__main__":
    main()
