"""What this GPU can do at best, which other figures are compared with: a large copy and a large product.

python -m tools.bench.gpu_ceilings
"""

from collections.abc import Iterator

import torch

from tools.bench.harness import Bench, Cases, Timing, run_cases, time_calls
from tools.bench.report import FIGURE, Row

SECTION = "ceilings"
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "GH200": 989e12, "H200": 989e12, "H100": 989e12}
"""Dense bfloat16 FLOP/s of the data sheets, by a part of the device's name; the first match counts."""


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
    """The device's dense bfloat16 FLOP/s, and the source of the number."""
    if bench.on_gpu:
        name = torch.cuda.get_device_name()
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"data sheet of the {part}"
    return gemm_rate(bench)[0], "measured 8192³ product"


def ceilings(bench: Bench) -> Iterator[Row]:
    rate, timing = copy_rate(bench)
    figures = {"bytes_per_second": rate} | timing.figures("copy")
    yield Row(SECTION, "device copy, 4 GiB", FIGURE, f"{rate / 1e9:,.0f} GB/s", figures)
    rate, timing = gemm_rate(bench)
    figures = {"flops_per_second": rate} | timing.figures("product")
    yield Row(SECTION, "bf16 product, 8192³", FIGURE, f"{rate / 1e12:,.0f} TFLOP/s", figures)


CASES: Cases = {"copy and product": ceilings}

if __name__ == "__main__":
    run_cases(__doc__, SECTION, CASES)
