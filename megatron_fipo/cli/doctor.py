"""Which accelerations are present, and what is lost without each. Facts are gathered once; the rows are a pure function."""

import platform
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_fipo.config.gpu_rules import fp8_obstacle
from megatron_fipo.engine.vllm_start import SUPPORTED_VLLM, installed_vllm, is_supported
from megatron_fipo.environment import Accelerators, has_nvidia_apex, installed_version


@dataclass(frozen=True)
class Component:
    """A package that training uses if it is there. `module` is what Python imports, `name` what pip installs."""

    name: str
    module: str
    required: bool
    use: str
    """What it does here, shown where it is present."""
    loss: str
    """What happens without it, shown where it is absent."""


COMPONENTS = (
    Component("torch", "torch", True, "tensors and gradients", "nothing runs"),
    Component("megatron-core", "megatron.core", True, "model, parallelism, optimizer", "nothing trains"),
    Component(
        "transformers",
        "transformers",
        True,
        "configs, tokenizers, the local rollout engine",
        "no model can be read",
    ),
    Component("ray", "ray", True, "runs trainer ranks and rollout engines", "nothing trains"),
    Component("omegaconf", "omegaconf", True, "reads configurations", "no configuration can be read"),
    Component(
        "transformer-engine",
        "transformer_engine",
        False,
        "fused layers and Adam on GPUs",
        "training on GPUs needs it or apex; with apex, the portable layers build the model: the same mathematics, slower and with more "
        "memory",
    ),
    Component(
        "apex",
        "apex",
        False,
        "fused Adam and gradient accumulation where transformer-engine is absent (its layer norm is for LayerNorm; all models here "
        "have RMSNorm)",
        "nothing where transformer-engine is present; training on GPUs needs one of them",
    ),
    Component(
        "vllm",
        "vllm",
        False,
        "rollouts with rollout.engine=vllm",
        "rollout.engine=local makes the rollouts: the same responses, slower, for small models only",
    ),
    Component(
        "flash-attn",
        "flash_attn",
        False,
        "attention within transformer-engine",
        "transformer-engine attends through cuDNN alone",
    ),
    Component(
        "triton",
        "triton",
        False,
        "head and loss kernels on GPUs, and what torch.compile fuses",
        "head, loss and small fusions run as plain torch: the same numbers, slower on GPUs",
    ),
    Component(
        "wandb",
        "wandb",
        False,
        "tracking",
        "a run says so once and goes on without it, unless tracking.wandb=disabled",
    ),
)


@dataclass(frozen=True)
class Facts:
    python: str
    versions: dict[str, str | None]
    """By component name: the version, "unknown version" where it is importable without metadata, or None."""
    cuda: str | None
    """The CUDA version that torch was built for."""
    devices: tuple[str, ...]
    """Names of the visible CUDA devices."""
    apex_is_nvidia: bool
    capability: tuple[int, int] | None = None
    """Compute capability, of the oldest of the devices; None where there is none."""


@dataclass(frozen=True)
class Row:
    name: str
    state: str
    note: str
    severity: str
    """`ok`, `optional` (absent, something is lost) or `missing` (absent, nothing runs)."""


def rows(facts: Facts) -> list[Row]:
    """One row per component, Python and CUDA first."""
    return [
        Row("Python", facts.python, "", "ok"),
        _cuda_row(facts),
        *(_row(component, facts) for component in COMPONENTS),
    ]


def _cuda_row(facts: Facts) -> Row:
    if facts.devices:
        names = ", ".join(f"{facts.devices.count(name)} x {name}" for name in dict.fromkeys(facts.devices))
        return Row("CUDA", facts.cuda or "unknown version", names, "ok")
    if facts.cuda:
        note = f"torch was built for CUDA {facts.cuda} but sees no device; training runs on CPU cores, for small models only"
        return Row("CUDA", "no device", note, "optional")
    return Row(
        "CUDA",
        "absent",
        "training runs on CPU cores, through the same code: for small models only",
        "optional",
    )


def _row(component: Component, facts: Facts) -> Row:
    version = facts.versions.get(component.name)
    if component.name == "apex" and version is not None and not facts.apex_is_nvidia:
        note = f"this is PyPI's apex, a web toolkit, not NVIDIA's: pip uninstall apex. Without NVIDIA's: {component.loss}"
        return Row("apex", f"{version}, not NVIDIA's", note, "optional")
    if component.name == "vllm" and version is not None and not is_supported(version):
        return Row(
            "vllm",
            version,
            f"rollout.engine=vllm needs {SUPPORTED_VLLM}. Without it: {component.loss}",
            "optional",
        )
    if component.name == "transformer-engine" and version is not None:
        return Row(component.name, version, f"{component.use}; {_fp8_note(facts)}", "ok")
    if version is not None:
        return Row(component.name, version, component.use, "ok")
    return Row(component.name, "absent", component.loss, "missing" if component.required else "optional")


def _fp8_note(facts: Facts) -> str:
    """With which recipes these GPUs multiply in FP8, or why with none."""
    machine = Accelerators(facts.capability, facts.cuda, facts.versions["transformer-engine"])
    obstacles = {recipe: fp8_obstacle(recipe, machine) for recipe in ("delayed", "tensorwise", "blockwise")}
    possible = [recipe for recipe, obstacle in obstacles.items() if obstacle is None]
    if not possible:
        return f"no FP8: {obstacles['delayed']}"
    return f"FP8 with model.fp8_recipe={' or '.join(possible)}"


def gather_facts() -> Facts:
    """Look at this environment. Only torch is imported, to ask for CUDA devices."""
    cuda, devices, capability = _cuda()
    return Facts(
        python=platform.python_version(),
        versions={component.name: _version(component) for component in COMPONENTS},
        cuda=cuda,
        devices=devices,
        apex_is_nvidia=has_nvidia_apex(),
        capability=capability,
    )


def _cuda() -> tuple[str | None, tuple[str, ...], tuple[int, int] | None]:
    try:
        import torch
    except (ImportError, OSError):
        return None, (), None
    devices = range(torch.cuda.device_count())
    names = tuple(torch.cuda.get_device_name(index) for index in devices)
    return (
        torch.version.cuda,
        names,
        min((torch.cuda.get_device_capability(index) for index in devices), default=None),
    )


def _version(component: Component) -> str | None:
    found = installed_version(component.module, component.name)
    if found and component.name == "vllm":  # its build for CPUs has another name
        return installed_vllm() or "unknown version"
    return found


def main(console: Console | None = None) -> int:
    """Print the table; returns 1 if a required package is absent."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "version", "note"):
        table.add_column(column)
    style = {"ok": "green", "optional": "yellow", "missing": "bold red"}
    found = rows(gather_facts())
    for row in found:
        table.add_row(row.name, row.state, row.note, style=style[row.severity])
    (console or Console()).print(table)
    return int(any(row.severity == "missing" for row in found))
