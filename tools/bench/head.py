"""The log-prob head against plain logits and cross-entropy, forward and backward. One CPU thread, float32.

    python tools/bench/head.py            # about ten minutes; prints the tables of docs/benchmarks.md

Every measurement runs in a process of its own, and the whole list runs several times over, so that a busy moment of the machine
does not hit one variant alone. Time is the best of all calls. Memory is what the process's resident set peaked at during its
first call (VmHWM, reset just before) beyond what it held before: inputs are not in it, the gradients that come back are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe_machine, resident
from torch import Tensor

TOKENS, HIDDEN, VOCABULARY = 2048, 1024, 32_000
GRADIENTS = 4 * HIDDEN * (VOCABULARY + TOKENS)
"""Bytes of the two gradients that any method returns."""
ROUNDS, CALLS = 3, 2
BUDGETS = (16, 64, 512)
"""Megabytes of workspace; the last holds all logits in one slab."""
USUAL = 64
SHARES = (25, 50, 90, 100)
"""Per cent of the tokens that are response tokens."""


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, *_: int) -> Tensor:
    """Logits of all tokens, log-softmax, and a mask afterwards."""
    losses = F.cross_entropy(hidden.squeeze(1) @ weight.t(), labels, reduction="none")
    return losses[rows].sum()


def plain_with_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, *_: int) -> Tensor:
    """The same, and the entropy that training logs, without gradient."""
    log_probabilities = (hidden.squeeze(1) @ weight.t()).log_softmax(dim=-1)
    with torch.no_grad():
        (log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return -log_probabilities.gather(1, labels[:, None]).squeeze(1)[rows].sum()


def head(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, workspace_mb: int, memory_mb: int
) -> Tensor:
    """Log-probs of the response rows alone; their entropy comes with them."""
    import megatron_fipo.model  # noqa: F401  (the CPU platform, before Megatron-Core)
    from megatron_fipo.config import HeadConfig
    from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs

    settings = HeadConfig(workspace_mb=workspace_mb, logits_memory_mb=memory_mb)
    request = HeadRequest(rows, labels[rows], VOCABULARY, 1.0, settings, entropy_gradient=False)
    return -response_log_probs(hidden, weight, request, None, False)[0].sum()


METHODS: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "plain_with_entropy": plain_with_entropy,
    "head": head,
}


def measure(method: str, share: int, workspace_mb: int, memory_mb: int) -> dict[str, float]:
    """Best seconds of a few calls and bytes of the first, in this process."""
    torch.set_num_threads(1)
    run = METHODS[method]
    _call(run, share, workspace_mb, memory_mb, 16, VOCABULARY // 100)  # libraries set themselves up
    calls = [_call(run, share, workspace_mb, memory_mb, TOKENS, VOCABULARY) for _ in range(CALLS)]
    return {"seconds": min(seconds for seconds, _ in calls), "bytes": calls[0][1]}


def _call(
    run: Callable[..., Tensor], share: int, workspace_mb: int, memory_mb: int, tokens: int, vocabulary: int
) -> tuple[float, int]:
    """Seconds and peak bytes of one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).div_(HIDDEN**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    rows = torch.arange(tokens - tokens * share // 100, tokens)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run(hidden, weight, labels, rows, workspace_mb, memory_mb).backward()
    return time.perf_counter() - start, resident("VmHWM") - before


Variant = tuple[str, int, int, int]
"""Method, response share in per cent, megabytes of workspace, megabytes of kept logits."""
KEEP_ALL = 4 * TOKENS * VOCABULARY // 2**20


def _measure_all(variants: list[Variant]) -> dict[Variant, dict[str, float]]:
    found: dict[Variant, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for variant in variants:
            command = [sys.executable, __file__, "--measure", *map(str, variant)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            ).stdout
            new, old = json.loads(output), found.get(variant)
            found[variant] = {key: min(new[key], old[key]) for key in new} if old else new
    return found


def _row(name: str, found: dict[str, float], reference: dict[str, float]) -> str:
    cells = [
        name,
        f"{found['seconds'] / reference['seconds']:.2f}",
        f"{found['bytes'] / reference['bytes']:.2f}",
        f"{found['seconds']:.2f} s",
        f"{found['bytes'] / 2**20:,.0f} MiB",
        f"{(found['bytes'] - GRADIENTS) / 2**20:,.0f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", nargs=4, metavar=("METHOD", "SHARE", "MB", "KEPT"), help="one measurement, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        method, *numbers = arguments.measure
        print(json.dumps(measure(method, *map(int, numbers))))
        return
    print(
        f"{date.today()}, {describe_machine()}, one thread, {TOKENS:,} tokens, H {HIDDEN:,}, V {VOCABULARY:,}, float32\n"
    )
    named: list[tuple[str, Variant]] = [
        ("plain", ("plain", 100, 0, 0)),
        ("plain, with entropy", ("plain_with_entropy", 100, 0, 0)),
        *((f"head, {budget} MiB", ("head", 100, budget, 0)) for budget in BUDGETS),
        (f"head, {USUAL} MiB, logits kept", ("head", 100, USUAL, KEEP_ALL)),
    ]
    shares: list[tuple[str, Variant]] = [(f"{share} %", ("head", share, USUAL, 0)) for share in SHARES]
    found = _measure_all(list(dict.fromkeys(variant for _, variant in named + shares)))
    reference = found["plain", 100, 0, 0]
    for heading, rows in (("", named), ("response share", shares)):
        print(
            f"| {heading} | time / plain | memory / plain | time | memory | memory without the gradients |\n|---|---|---|---|---|---|"
        )
        print(*(_row(name, found[variant], reference) for name, variant in rows), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
