"""What this machine can do at best: what the other figures are held against."""

from collections.abc import Callable, Iterator

import torch

from gpu.measure import Bench, Timing, time_calls
from gpu.report import FIGURE, Row

SECTION = "ceilings"
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "GH200": 989e12, "H200": 989e12, "H100": 989e12}
"""Dense bfloat16 FLOP/s of the data sheets, by what the device's name contains; the first that fits."""


def copy_rate(bench: Bench) -> tuple[float, Timing]:
    """Bytes per second, read plus written, of a large device-to-device copy."""
    source = torch.randn(bench.pick(2**30, 2**16), device=bench.device)
    target = torch.empty_like(source)
    timing = time_calls(bench, lambda: target.copy_(source))
    return 2 * source.nbytes / timing.median, timing


def gemm_rate(bench: Bench) -> tuple[float, Timing]:
    """FLOP/s of a large bfloat16 product of random matrices."""
    size = bench.pick(8192, 64)
    left, right = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    timing = time_calls(bench, lambda: torch.mm(left, right, out=out))
    return 2 * size**3 / timing.median, timing


def peak_flops(bench: Bench) -> tuple[float, str]:
    """The device's dense bfloat16 FLOP/s, and where the number is from."""
    if bench.on_gpu:
        name = torch.cuda.get_device_name()
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"data sheet of the {part}"
    return gemm_rate(bench)[0], "measured 8192³ product"


def ceilings(bench: Bench) -> Iterator[Row]:
    rate, timing = copy_rate(bench)
    yield Row(
        SECTION,
        "device copy, 4 GiB",
        FIGURE,
        f"{rate / 1e9:,.0f} GB/s",
        {"bytes_per_second": rate} | timing.figures("copy"),
    )
    rate, timing = gemm_rate(bench)
    name = "bf16 product, 8192³"
    yield Row(
        SECTION,
        name,
        FIGURE,
        f"{rate / 1e12:,.0f} TFLOP/s",
        {"flops_per_second": rate} | timing.figures("product"),
    )


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {"copy and product": ceilings}
