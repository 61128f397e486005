"""One measuring process: prints what it measures, as soon as it has it.

python -m megatron_fipo.calibrate.measure KIND JOB [RANK]     JOB: the fields of `job.Job` as JSON
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_fipo.calibrate.job import FIGURES, Job
from megatron_fipo.calibrate.messages import Device, Message, Skipped, as_line
from megatron_fipo.environment import HUB_OFFLINE
from megatron_fipo.errors import one_line
from megatron_fipo.node.preflight.children import result_printer
from megatron_fipo.node.preflight.facts import from_json

LOOK_EVERY_S = 0.2
SHARES = {"transfers": 6.0, "products": 25.0, "layer": 25.0, "disk": 6.0}
"""Of the time of a rank's process."""


def messages(kind: str, job: Job, rank: int) -> Iterator[Message]:
    """What a process of this kind measures: `rank`, `collective` or `decode`."""
    import torch

    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if kind == "rank":
        yield from as_rank(job, device)
    elif kind == "collective":
        from megatron_fipo.calibrate import collective

        store = Path(job.folder) / "store"
        yield from collective.measure(rank, job.ranks, store, device.type == "cuda", job.budget_s)
    else:
        from megatron_fipo.calibrate import decode

        yield from decode.measure(job.case(), time.monotonic() + job.budget_s)


def as_rank(job: Job, device: Any) -> Iterator[Message]:
    """One after another, in one process, because imports take longer than some measurements. One that fails costs its figures."""
    from megatron_fipo.calibrate import layer, products, transfers

    case, second = job.case(), job.budget_s / sum(SHARES.values())
    parts: dict[str, Callable[[float], Iterator[Message]]] = {
        "transfers": lambda budget_s: transfers.measure(device, budget_s),
        "products": lambda budget_s: products.measure(case, device, budget_s),
        "layer": lambda budget_s: layer.measure(case, device, budget_s),
        # The last, because a file system that does not answer ends everything.
        "disk": lambda budget_s: transfers.write_files(Path(job.disk), budget_s),
    }
    yield describe()
    for name, measure in parts.items():
        try:
            yield from measure(second * SHARES[name])
        except Exception as error:
            for figure in FIGURES[name]:
                yield Skipped(figure, one_line(error)[:200])


def describe() -> Device:
    """The GPUs of this process, or its node without any."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", 0, psutil.virtual_memory().total)
    facts = torch.cuda.get_device_properties(0)
    return Device(torch.cuda.get_device_name(0), torch.cuda.device_count(), facts.total_memory)


def end_with(parent: int) -> None:
    """End this process soon after `parent` has ended, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(kind: str, job: str, rank: str = "0") -> int:
    """Print the messages of a kind, as lines of JSON."""
    report = result_printer()
    todo: Job = from_json(Job, json.loads(job))
    end_with(todo.parent)
    try:
        # As in ranks and engines. torch, which reads them, is imported later.
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | todo.config().env
        os.environ.setdefault(HUB_OFFLINE, "1")
        for message in messages(kind, todo, int(rank)):
            report(as_line(message))
    except Exception as error:  # the reason for figures of another machine, whoever raises it
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
