"""What nodes measure together: bandwidth of each pair, clock offsets from the head, and an all-reduce.

Runs in child processes, one for each GPU of a node, or one if there is none:

    python -m megatron_fipo.node.preflight.network PLAN

Prints each result as a line of JSON as soon as it has it, so that a process that hangs leaves what it measured before.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.errors import one_line
from megatron_fipo.network import interface_of, socket_variables
from megatron_fipo.node.addresses import resolve, route_source
from megatron_fipo.node.preflight.children import result_printer
from megatron_fipo.node.preflight.facts import ClockOffset, Link, from_json
from megatron_fipo.node.preflight.pairs import opponents
from megatron_fipo.node.preflight.plan import Plan

FIRST_BYTES = 2**16
GROWTH = 8
MOST_BYTES = {"cuda": 2**30, "cpu": 2**25}
LONG_ENOUGH_S = 0.2
"""Messages grow until one takes so long. A slow link is measured in a second, a fast one without its latency."""
PINGS = 10
ALL_REDUCE_REPEATS = 5


def measure(plan: Plan, report: Callable[[str, Any], None]) -> None:
    """Exchange with each other node in turn, then reduce over all; `report(kind, value)` gets each result.

    Collectives: for each other node a group of two, then an all-reduce of `MOST_BYTES` over all processes.
    """
    os.environ |= socket_variables(interface_of(route_source(resolve(plan.address))), os.environ)
    # An operation of NCCL that does not end in time raises, instead of ending the process from a thread.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    if plan.gpus:
        torch.cuda.set_device(_device(plan))
    for peer in opponents(len(plan.names), plan.node):
        if peer is not None:
            _meet(plan, peer, report)
    if len(plan.names) * plan.local_ranks > 1:
        rank = plan.node * plan.local_ranks + plan.local_rank
        with group(plan, "all", rank, len(plan.names) * plan.local_ranks):
            report("all_reduce_gb_per_s", all_reduce_bandwidth(_device(plan)))


def _meet(plan: Plan, peer: int, report: Callable[[str, Any], None]) -> None:
    first, second = sorted((plan.node, peer))
    rank = int(plan.node == second)
    names = plan.names[first], plan.names[second], plan.local_rank
    try:
        with group(plan, f"{first}-{second}-{plan.local_rank}", rank, 2):
            report("link", asdict(Link(*names, pair_bandwidth(rank, _device(plan)))))
            if first == 0 and plan.local_rank == 0:
                offset = clock_offset(rank, _device(plan))
                if offset is not None:
                    report("clock", asdict(ClockOffset(plan.names[second], *offset)))
    except Exception as error:  # also what NCCL and gloo raise; the other pairs are measured all the same
        report("link", asdict(Link(*names, None, one_line(error)[:200])))


@contextmanager
def group(plan: Plan, name: str, rank: int, size: int) -> Iterator[None]:
    """A process group of `size` processes, which need not take part in any other: a dead link breaks no other pair."""
    timeout = timedelta(seconds=plan.timeout_s)
    store = dist.TCPStore(plan.address, plan.port, timeout=timeout)
    dist.init_process_group(
        "nccl" if plan.gpus else "gloo",
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=_device(plan) if plan.gpus else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _device(plan: Plan) -> torch.device:
    return torch.device("cuda", plan.local_rank) if plan.gpus else torch.device("cpu")


def pair_bandwidth(rank: int, device: torch.device) -> float:
    """GB/s in each direction while both ranks of the group send. Sends at most 1.3 times `MOST_BYTES`, and a size per message."""
    peer, nbytes = 1 - rank, FIRST_BYTES
    _exchange(peer, nbytes, device)  # connects
    while True:
        elapsed = _exchange(peer, nbytes, device)
        decision = torch.tensor(0 if elapsed >= LONG_ENOUGH_S else nbytes * GROWTH, device=device)
        decision.clamp_(max=MOST_BYTES[device.type])
        if rank == 0:
            dist.send(decision, peer)
        else:
            dist.recv(decision, peer)
        following = int(decision)
        if following <= nbytes:
            return nbytes / elapsed / 1e9
        nbytes = following


def _exchange(peer: int, nbytes: int, device: torch.device) -> float:
    """Seconds that it takes to send `nbytes` to the peer and to receive as many."""
    sent, received = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    _finish(device)
    start = time.perf_counter()
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    _finish(device)
    return time.perf_counter() - start


def clock_offset(
    rank: int, device: torch.device, clock: Callable[[], float] = time.time
) -> tuple[float, float] | None:
    """On rank 0: seconds by which rank 1's clock is ahead, and half of the shortest round trip. None on rank 1.

    Sends 8 bytes each way `PINGS` times.
    """
    answers = []
    for _ in range(PINGS):
        remote = torch.zeros(1, dtype=torch.float64, device=device)
        if rank == 0:
            sent = clock()
            dist.send(remote, 1)
            dist.recv(remote, 1)
            _finish(device)
            received = clock()
            answers.append(((received - sent) / 2, float(remote) - (sent + received) / 2))
        else:
            dist.recv(remote, 0)
            _finish(device)
            dist.send(remote.fill_(clock()), 0)
    if rank != 0:
        return None
    uncertainty, offset = min(answers)
    return offset, uncertainty


def all_reduce_bandwidth(device: torch.device) -> float:
    """Bus bandwidth in GB/s: what each rank sends in a ring, per second. All-reduces up to `MOST_BYTES` a few times."""
    size = dist.get_world_size()
    nbytes = FIRST_BYTES
    while True:
        values = torch.zeros(nbytes // 4, dtype=torch.float32, device=device)
        dist.all_reduce(values)
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(values)
        _finish(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        elapsed = float(slowest)
        if elapsed >= LONG_ENOUGH_S or nbytes >= MOST_BYTES[device.type]:
            return nbytes / elapsed * 2 * (size - 1) / size / 1e9
        nbytes = min(nbytes * GROWTH, MOST_BYTES[device.type])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(plan: str) -> int:
    """Measure what `plan` (JSON) states; prints lines of [kind, value]."""
    report = result_printer()
    torch.set_num_threads(1)
    try:
        measure(from_json(Plan, json.loads(plan)), lambda kind, value: report([kind, value]))
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
