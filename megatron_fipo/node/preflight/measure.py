"""What one node measures on its own. Each check runs in a child process:

python -m megatron_fipo.node.preflight.measure CHECK [ARGUMENT]
"""

import hashlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_fipo
from megatron_fipo.environment import package_versions
from megatron_fipo.errors import one_line
from megatron_fipo.node.preflight.children import Check, result_printer
from megatron_fipo.node.preflight.facts import (
    NodeFacts,
    ProcessLimits,
    Product,
    Space,
    from_json,
    to_json,
)
from megatron_fipo.node.preflight.gpus import inspect_gpus

GPU_SHAPE, CPU_SHAPE = (4096, 2048), (512, 512)
"""Rows and columns of the matrix that is multiplied with its transpose's shape."""
GPU_REPEATS = 50
RDMA_FOLDER = Path("/sys/class/infiniband")


def measure_node(dtype: str, timeout_s: float) -> NodeFacts:
    """Run all checks of this node at once, for at most `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    checks = {
        "gpus": Check(__name__, "gpus"),
        "products": Check(__name__, "products", dtype),
        "space": Check(__name__, "space"),
        "limits": Check(__name__, "limits"),
        "versions": Check(__name__, "versions"),
    }
    found, failures = {}, {}
    for name, check in checks.items():
        values, failure = check.results(deadline)
        if failure is None:
            found[name] = values[-1]
        else:
            failures[name] = failure
    return from_json(NodeFacts, {**found, "failures": failures})


def multiply(dtype: str) -> tuple[Product, ...]:
    """One product on each GPU, or on the CPU if there is none."""
    import torch

    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    rows, columns = GPU_SHAPE if devices else CPU_SHAPE
    # Entries of -1, 0, 1, few enough that every sum is a whole number below 256, which bfloat16 holds exactly.
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-1, 2, shape, generator=generator) * torch.randint(0, 2, shape, generator=generator)
        for shape in ((rows, columns), (columns, rows))
    )
    exact = left.float() @ right.float()
    return tuple(
        multiply_on(device, left.to(kind), right.to(kind), exact, GPU_REPEATS if devices else 1)
        for device in devices or ["cpu"]
    )


def multiply_on(device: str, left: Any, right: Any, exact: Any, repeats: int) -> Product:
    """Multiply on one device and compare each product with `exact` there.

    `left` [m, k] and `right` [k, m] have the dtype of the product, `exact` [m, m] is float32.
    """
    import torch

    left, right, exact = left.to(device), right.to(device), exact.to(device)
    product = left @ right
    nan = wrong = torch.zeros((), dtype=torch.int64, device=device)
    elapsed = 0.0
    for _ in range(repeats):
        _finish(device)
        start = time.perf_counter()
        torch.matmul(left, right, out=product)
        _finish(device)
        elapsed += time.perf_counter() - start
        different, invalid = count_wrong(product, exact)
        wrong, nan = wrong + different, nan + invalid
    work = 2 * left.shape[0] * left.shape[1] * right.shape[1] * repeats
    return Product(device, exact.numel() * repeats, int(nan), int(wrong), work / elapsed / 1e12)


def count_wrong(product: Any, exact: Any) -> tuple[Any, Any]:
    """Numbers of elements that differ from `exact` (NaN included), and of NaN: int64 tensors on the device."""
    return (product.float() != exact).sum(), product.isnan().sum()


def _finish(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def measure_space(paths: tuple[str, ...] = ("/tmp", "/dev/shm")) -> tuple[Space, ...]:
    """Free space that an ordinary user gets."""
    return tuple(Space(path, round(shutil.disk_usage(path).free / 2**30, 2)) for path in paths)


def process_limits() -> ProcessLimits:
    """The limits that this process has inherited from the job."""
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    locked = _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    devices = sorted(os.listdir(RDMA_FOLDER)) if RDMA_FOLDER.is_dir() else []
    return ProcessLimits(soft, hard, None if locked is None else locked / 2**30, tuple(devices))


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def versions() -> dict[str, str]:
    """Versions of Python and of what training imports, and the hash of this package's source."""
    return {
        "Python": platform.python_version(),
        **package_versions(),
        "source of megatron-fipo": source_hash(Path(megatron_fipo.__file__).parent),
    }


def source_hash(folder: Path) -> str:
    """The first 12 digits of a sha256 over names and contents of all Python files below `folder`."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


CHECKS: dict[str, Callable[..., Any]] = {
    "gpus": inspect_gpus,
    "products": multiply,
    "space": measure_space,
    "limits": process_limits,
    "versions": versions,
}


def main(check: str, *arguments: str) -> int:
    """Print the result of one check as a line of JSON."""
    report = result_printer()
    try:
        result = CHECKS[check](*arguments)
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        return 1
    report(_plain(result))
    return 0


def _plain(result: Any) -> Any:
    if isinstance(result, tuple):
        return [to_json(item) for item in result]
    return result if isinstance(result, dict) else to_json(result)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
