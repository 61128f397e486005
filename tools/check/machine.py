"""What the GPU check runs on: its name for the table, and why the check cannot run here."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {
    "torch": "torch",
    "Triton": "triton",
    "megatron-core": "megatron-core",
    "Transformer Engine": "transformer-engine",
    "Liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "Ray": "ray",
}
NEEDED = {
    "torch": "pip install torch",
    "triton": "pip install triton",
    "megatron.core": "pip install megatron-core",
    "pytest": "pip install pytest (with pluggy, iniconfig, packaging)",
}
"""Modules without which nothing runs, and the fix."""
OLDEST_CAPABILITY = (8, 0)
"""Of Triton's kernels, and of bfloat16 in hardware (Ampere)."""
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if found["available"]:
    found |= {"name": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
print("found " + json.dumps(found))
"""
"""In a process of its own, because a process that has looked holds memory of the GPU."""


@dataclass(frozen=True)
class Gpu:
    """What torch finds."""

    cuda: str | None
    """CUDA version that torch was built for."""
    name: str | None
    """None if torch finds no GPU."""
    capability: tuple[int, int] | None


def find_gpu() -> Gpu:
    """The first GPU. ValueError if torch cannot be imported."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"torch cannot be imported: {last}; reinstall it")
    found = json.loads(lines[0].removeprefix("found "))
    capability = found.get("capability")
    return Gpu(found["cuda"], found.get("name"), tuple(capability) if capability else None)


def check_packages() -> None:
    """ValueError that names the first missing package and how to install it."""
    for module, fix in NEEDED.items():
        try:
            present = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # a parent is missing
            present = False
        if not present:
            raise ValueError(f"{module} is not installed; {fix}")


def usable_gpu(gpu: Gpu) -> Gpu:
    """The same. ValueError, with the fix, if the check cannot run on what torch found."""
    if gpu.name is None and gpu.cuda is None:
        raise ValueError(
            "this torch was built without CUDA; install one for CUDA, or use --rehearse for toy sizes on the CPU"
        )
    if gpu.name is None or gpu.capability is None:
        raise ValueError("torch finds no GPU here; --rehearse runs at toy size on the CPU")
    if gpu.capability < OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, each)) for each in (gpu.capability, OLDEST_CAPABILITY))
        raise ValueError(
            f"{gpu.name} has compute capability {found} and the kernels need {needed} (Ampere); use a newer GPU"
        )
    return gpu


def describe_machine(gpu: Gpu | None, part: str | None) -> dict[str, str]:
    """The line above the table; without a GPU, of a rehearsal."""
    machine = {"GPU check of": date.today().isoformat()}
    if part:
        machine["part"] = part
    machine["on"] = "CPU" if gpu is None else f"{gpu.name}, driver {_driver()}"
    for name, package in PACKAGES.items():
        try:
            machine[name] = version(package)
        except PackageNotFoundError:
            machine[name] = "present" if importlib.util.find_spec(package.replace("-", "_")) else "absent"
    machine["Python"] = ".".join(map(str, sys.version_info[:3]))
    return machine


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
