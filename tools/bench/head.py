"""The log-prob head against plain logits and cross-entropy, forward and backward. One CPU thread, float32.

    python -m tools.bench.head            # about ten minutes; prints the tables of docs/benchmarks.md

Every measurement runs in a process of its own, and the entire list runs several times, so that load from other processes does
not affect one variant only. Time is the best of all calls. Memory is the peak of the process's resident set during its first
call beyond that before it: it excludes inputs and includes the returned gradients.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench.harness import heading, in_own_process, measurement, parser, peak_of, table

TOKENS, HIDDEN, VOCABULARY = 2048, 1024, 32_000
GRADIENTS = 4 * HIDDEN * (VOCABULARY + TOKENS)
"""Bytes of the two gradients that any method returns."""
ROUNDS, CALLS = 3, 2
BUDGETS = (16, 64, 512)
"""Megabytes of workspace; the last is enough for all logits in one slab."""
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
    """Log-probs of the response rows only; their entropy comes with them."""
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


def measure(method: str, *numbers: str) -> dict[str, float]:
    """Best seconds of a few calls and bytes of the first, in this process."""
    torch.set_num_threads(1)
    run, (share, *megabytes) = METHODS[method], map(int, numbers)
    _call(run, share, megabytes, 16, VOCABULARY // 100)  # libraries set themselves up
    calls = [_call(run, share, megabytes, TOKENS, VOCABULARY) for _ in range(CALLS)]
    return {"seconds": min(seconds for seconds, _ in calls), "bytes": calls[0][1]}


def _call(
    run: Callable[..., Tensor], share: int, megabytes: Sequence[int], tokens: int, vocabulary: int
) -> tuple[float, int]:
    """Seconds and peak bytes of one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).div_(HIDDEN**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    rows = torch.arange(tokens - tokens * share // 100, tokens)
    return peak_of(lambda: run(hidden, weight, labels, rows, *megabytes).backward())[1:]


Variant = tuple[str, int, int, int]
"""Method, response share in per cent, megabytes of workspace, megabytes of kept logits."""
KEEP_ALL = 4 * TOKENS * VOCABULARY // 2**20


def _measure_all(variants: list[Variant]) -> dict[Variant, dict[str, float]]:
    found: dict[Variant, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for variant in variants:
            new, old = in_own_process("tools.bench.head", *variant), found.get(variant)
            found[variant] = {key: min(new[key], old[key]) for key in new} if old else new
    return found


def _row(name: str, found: dict[str, float], reference: dict[str, float]) -> tuple[str, ...]:
    return (
        name,
        f"{found['seconds'] / reference['seconds']:.2f}",
        f"{found['bytes'] / reference['bytes']:.2f}",
        f"{found['seconds']:.2f} s",
        f"{found['bytes'] / 2**20:,.0f} MiB",
        f"{(found['bytes'] - GRADIENTS) / 2**20:,.0f} MiB",
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--measure", nargs=4, metavar=("METHOD", "SHARE", "MB", "KEPT"), help="one measurement, as JSON"
    )
    if measurement(measure, options.parse_args().measure):
        return
    print(heading("one thread", f"{TOKENS:,} tokens, H {HIDDEN:,}, V {VOCABULARY:,}", "float32") + "\n")
    named: list[tuple[str, Variant]] = [
        ("plain", ("plain", 100, 0, 0)),
        ("plain, with entropy", ("plain_with_entropy", 100, 0, 0)),
        *((f"head, {budget} MiB", ("head", 100, budget, 0)) for budget in BUDGETS),
        (f"head, {USUAL} MiB, logits kept", ("head", 100, USUAL, KEEP_ALL)),
    ]
    shares: list[tuple[str, Variant]] = [(f"{share} %", ("head", share, USUAL, 0)) for share in SHARES]
    found = _measure_all(list(dict.fromkeys(variant for _, variant in named + shares)))
    reference = found["plain", 100, 0, 0]
    heads = ("time / plain", "memory / plain", "time", "memory", "memory without the gradients")
    for first, rows in (("", named), ("response share", shares)):
        print(table((first, *heads), [_row(name, found[v], reference) for name, v in rows]), end="\n\n")


if __name__ == "__main__":
    main()
