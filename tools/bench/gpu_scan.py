"""Speed of the FutureKL scan and of the policy loss: against a serial scan, the authors' listing, torch, and a copy.

python -m tools.bench.gpu_scan
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.future_kl import scan_future_kl
from megatron_fipo.objective.scan_layout import ScanPlan
from tests.gpu.compare import largest_difference, relative_norm, require
from tests.gpu.loss_inputs import LossInputs, loss_and_gradients, plan_bytes, random_loss_inputs
from tools.bench.future_kl import quadratic_listing
from tools.bench.harness import (
    Bench,
    Cases,
    Timing,
    peak_extra,
    run_cases,
    sets_for,
    time_calls,
    time_small,
)
from tools.bench.report import FIGURE, Row, aimed, duration, mebibytes

SECTION = "scan"
HALF_LIFE = 32.0
SERIAL_AIM = 10.0
"""At 20,480 tokens: least speed relative to the serial scan, most time relative to a copy of its bytes."""


@dataclass(frozen=True)
class ScanSet:
    """One of several equal problems in memory of its own."""

    x: Tensor
    """[B, L]."""
    plan: ScanPlan
    no_sums: Tensor
    """[B·L, 0]: no columns to sum besides the scan."""


def scan_sets(bench: Bench, batch: int, length: int) -> tuple[list[ScanSet], int]:
    """Enough of them to overflow the cache, and the bytes that one scan has to move: x, F, and the part of its plan it reads."""
    inputs = random_loss_inputs([length] * batch, 71, holes=0.0)
    plan = inputs.rows.plan
    moved = 2 * inputs.log_probs.nbytes + plan_bytes(plan)
    sets = []
    for index in range(sets_for(bench, moved)):
        x = (0.05 * torch.randn(batch, length, generator=torch.Generator().manual_seed(index))).to(
            bench.device
        )
        sets.append(ScanSet(x, plan.to(bench.device), x.new_empty(batch * length, 0)))
    return sets, moved


def run_scan(given: ScanSet, kernels: str) -> Tensor:
    scanned, _ = scan_future_kl(given.x.view(-1), given.no_sums, given.plan, HALF_LIFE, kernels=kernels)
    return scanned.view_as(given.x)


def time_copy(bench: Bench, moved: int) -> Timing:
    """A device copy that reads and writes `moved` bytes in all, over as many input sets."""
    count = max(moved // 8, 1)
    pairs = [torch.randn(2, count, device=bench.device) for _ in range(sets_for(bench, moved))]
    return time_small(bench, [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])


def scan_methods(bench: Bench, sets: list[ScanSet]) -> dict[str, list[Callable[[], Tensor]]]:
    """Every method on every set; the serial one needs Triton."""
    from tools.bench.serial_scan import serial_scan

    gamma = torch.tensor([2.0 ** (-1 / HALF_LIFE)], device=bench.device)
    methods: dict[str, Callable[[ScanSet], Tensor]] = {
        "triton": lambda given: run_scan(given, "triton"),
        "torch": lambda given: run_scan(given, "torch"),
        "serial": lambda given: serial_scan(given.x, gamma),
    }
    return {
        name: [lambda method=method, given=given: method(given) for given in sets]
        for name, method in methods.items()
    }


def listing(bench: Bench, given: ScanSet) -> Callable[[], Tensor]:
    """The authors' computation, its input in the graph as in their code. It makes index tensors on the default device."""
    log_ratio, mask = given.x.detach().requires_grad_(), torch.ones_like(given.x)

    def call() -> Tensor:
        with bench.device:
            return quadratic_listing(log_ratio, mask)

    return call


def check_scan(method: str, found: Tensor, given: ScanSet) -> None:
    x, plan = given.x.cpu().double().view(-1), given.plan.to("cpu")
    truth, _ = scan_future_kl(x, given.no_sums.cpu(), plan, HALF_LIFE)
    error = largest_difference(found.view(-1), truth)
    require(error < 1e-5, f"{method} is off by {error:.2g} from float64")


def scan_speed(bench: Bench, batch: int, length: int) -> Iterator[Row]:
    sets, moved = scan_sets(bench, batch, length)
    methods = scan_methods(bench, sets)
    for name, calls in methods.items():
        check_scan(name, calls[0](), sets[0])
    timings = {name: time_small(bench, calls) for name, calls in methods.items()}
    timings["copy"] = time_copy(bench, moved)
    timings["triton_launched_by_host"] = eager = time_calls(bench, methods["triton"][0])
    figures: dict[str, float | str] = {"bytes": moved, "input_sets": len(sets)}
    for name, timing in timings.items():
        figures |= timing.figures(name)
    ours, shape = timings["triton"].median, f"{batch} x {length:,}"
    result = (
        f"{duration(ours)}, {moved / ours / 1e9:,.0f} GB/s; launched by the host {duration(eager.median)}; "
        f"torch {timings['torch'].median / ours:,.1f} x as slow"
    )
    yield Row(SECTION, f"FutureKL, {shape}", FIGURE, result, figures)
    serial, copy = timings["serial"].median / ours, ours / timings["copy"].median
    result = f"{serial:,.1f} x as fast ({duration(timings['serial'].median)})"
    name = f"vs serial scan, {shape}"
    if length == bench.pick(20_480, length):
        yield Row(SECTION, f"{name} (aim >= {SERIAL_AIM:.0f} x)", aimed(serial >= SERIAL_AIM), result)
    else:
        yield Row(SECTION, name, FIGURE, result)
    result = f"{copy:.2f} x its time ({duration(timings['copy'].median)})"
    yield Row(SECTION, f"vs copy of its bytes, {shape}", FIGURE, result)


def listing_speed(bench: Bench, batch: int, length: int) -> Iterator[Row]:
    sets, _ = scan_sets(bench, batch, length)
    authors = listing(bench, sets[0])
    check_scan("the listing", authors(), sets[0])
    theirs = time_calls(bench, authors, repeat=5, warm_up=1)
    ours = time_small(bench, [lambda given=given: run_scan(given, "triton") for given in sets])
    memory = peak_extra(bench, authors)
    ratio = theirs.median / ours.median
    result = f"{ratio:,.0f} x as slow ({duration(theirs.median)}), {mebibytes(memory)}"
    figures: dict[str, float | str] = {"ratio": ratio, "listing_extra_bytes": memory}
    name = f"authors' listing, {batch} x {length:,}"
    yield Row(SECTION, name, FIGURE, result, figures | theirs.figures("listing"))


def recipe_inputs(lengths: list[int]) -> LossInputs:
    """Inputs of the recipe's loss: entropies and the engine's log-probs for reports, no reference model."""
    inputs = random_loss_inputs(lengths, 81, holes=0.0)
    return replace(inputs, rows=replace(inputs.rows, reference_log_probs=None))


def loss_speed(bench: Bench, batch: int, length: int) -> Iterator[Row]:
    inputs, objective = recipe_inputs([length] * batch), ObjectiveConfig()
    moved = inputs.bytes_moved
    sets = [inputs.to(bench.device) for _ in range(sets_for(bench, moved))]
    true_gradient = loss_and_gradients(inputs.double(), objective, "torch")[1][0]
    timings = {}
    for kernels in ("triton", "torch"):
        error = relative_norm(loss_and_gradients(sets[0], objective, kernels)[1][0], true_gradient)
        require(error < 1e-5, f"{kernels}: the gradient is off by {error:.2g} from float64")
        calls = [
            lambda given=given, kernels=kernels: loss_and_gradients(given, objective, kernels)
            for given in sets
        ]
        timings[kernels] = time_small(bench, calls)
        timings[f"{kernels}_launched_by_host"] = time_calls(bench, calls[0])
    timings["copy"] = time_copy(bench, moved)
    figures: dict[str, float | str] = {"bytes": moved, "input_sets": len(sets)}
    for name, timing in timings.items():
        figures |= timing.figures(name)
    medians = {name: timing.median for name, timing in timings.items()}
    ours, by_host = medians["triton"], duration(medians["triton_launched_by_host"])
    result = (
        f"{duration(ours)}, {moved / ours / 1e9:,.0f} GB/s, {ours / medians['copy']:.2f} x a copy of its bytes; launched by the host "
        f"{by_host}; torch {medians['torch'] / ours:,.1f} x as slow, by the host {duration(medians['torch_launched_by_host'])}"
    )
    yield Row(SECTION, f"loss and gradient, {batch} x {length:,}", FIGURE, result, figures)


def _case(
    measure: Callable[[Bench, int, int], Iterator[Row]], full: int, toy: int
) -> Callable[[Bench], Iterator[Row]]:
    return lambda bench: measure(bench, bench.pick(32, 2), bench.pick(full, toy))


CASES: Cases = {
    "FutureKL, 20,480": _case(scan_speed, 20_480, 300),
    "FutureKL, 2,048": _case(scan_speed, 2_048, 130),
    "listing, 20,480": _case(listing_speed, 20_480, 300),
    "listing, 2,048": _case(listing_speed, 2_048, 130),
    "loss, 20,480": _case(loss_speed, 20_480, 300),
    "loss, 2,048": _case(loss_speed, 2_048, 130),
}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
