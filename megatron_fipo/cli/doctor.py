"""The `doctor` command: which packages that training uses are installed, and the effect of each missing one.

`inspect_environment` looks at the machine once; `check_components` is a pure function of what it found.
"""

import platform
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_fipo.config.card_rules import CardNeeds, card_findings
from megatron_fipo.config.gpu_rules import fp8_obstacle
from megatron_fipo.engine.vllm_start import SUPPORTED_VLLM, installed_vllm, is_supported
from megatron_fipo.environment import Accelerators, find_accelerators, has_nvidia_apex, installed_version

NO_ACCELERATORS = Accelerators(capability=None, cuda=None, transformer_engine=None)
Severity = Literal["ok", "optional", "missing"]
"""`ok`; `optional`: absent, training works without it; `missing`: absent, nothing runs."""


@dataclass(frozen=True)
class Component:
    """A package that training uses if it is installed.

    `module` is what Python imports, `name` what pip installs.
    """

    name: str
    module: str
    required: bool
    use: str
    """What it is used for, shown if it is installed."""
    without: str
    """The effect of its absence, shown if it is not installed."""


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
    Component("pyyaml", "yaml", True, "reads configurations", "no configuration can be read"),
    Component(
        "transformer-engine",
        "transformer_engine",
        False,
        "fused layers and Adam on GPUs",
        "training on GPUs needs it or apex; with apex, the model is built from the portable layers: the same "
        "mathematics, slower and with more memory",
    ),
    Component(
        "apex",
        "apex",
        False,
        "fused Adam and gradient accumulation if transformer-engine is absent (its layer norm is for "
        "LayerNorm; all models here have RMSNorm)",
        "no effect if transformer-engine is installed; training on GPUs needs one of them",
    ),
    Component(
        "vllm",
        "vllm",
        False,
        "rollouts with rollout.engine=vllm",
        "rollouts need rollout.engine=local: the same responses, slower, for small models only",
    ),
    Component(
        "flash-attn",
        "flash_attn",
        False,
        "attention within transformer-engine",
        "transformer-engine computes attention through cuDNN alone",
    ),
    Component(
        "triton",
        "triton",
        False,
        "kernels of head, loss and SwiGLU on GPUs",
        "head, loss and SwiGLU run as plain torch: the same numbers, slower on GPUs",
    ),
    Component(
        "wandb",
        "wandb",
        False,
        "tracking",
        "a run logs this once and continues without it, unless tracking.wandb=disabled",
    ),
)


@dataclass(frozen=True)
class EnvironmentFacts:
    """What was found on this machine."""

    python: str
    versions: dict[str, str | None]
    """By component name: the version, "unknown version" if it is importable without metadata, or None."""
    apex_is_nvidia: bool
    accelerators: Accelerators
    """The GPUs, and the packages for them; empty if torch cannot be imported."""


@dataclass(frozen=True)
class ComponentStatus:
    """One line of the table."""

    name: str
    state: str
    """The version, or why there is none."""
    note: str
    severity: Severity


def check_components(facts: EnvironmentFacts) -> list[ComponentStatus]:
    """The status of Python, CUDA and each component, in this order."""
    return [
        ComponentStatus("Python", facts.python, "", "ok"),
        _check_cuda(facts),
        *(_check(component, facts) for component in COMPONENTS),
    ]


def _check_cuda(facts: EnvironmentFacts) -> ComponentStatus:
    cuda, devices = facts.accelerators.cuda, [card.name for card in facts.accelerators.cards]
    if devices:
        names = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
        return ComponentStatus("CUDA", cuda or "unknown version", names, "ok")
    if cuda:
        note = f"torch was built for CUDA {cuda} but finds no device; training runs on CPU cores, for small models only"
        return ComponentStatus("CUDA", "no device", note, "optional")
    return ComponentStatus(
        "CUDA",
        "absent",
        "training runs on CPU cores with the same code, for small models only",
        "optional",
    )


def _check(component: Component, facts: EnvironmentFacts) -> ComponentStatus:
    version = facts.versions.get(component.name)
    if component.name == "apex" and version is not None and not facts.apex_is_nvidia:
        note = (
            "this is PyPI's apex, a web toolkit, not NVIDIA's: pip uninstall apex. "
            f"Without NVIDIA's: {component.without}"
        )
        return ComponentStatus("apex", f"{version}, not NVIDIA's", note, "optional")
    if component.name == "vllm" and version is not None and not is_supported(version):
        note = f"rollout.engine=vllm needs {SUPPORTED_VLLM}. Without it: {component.without}"
        return ComponentStatus("vllm", version, note, "optional")
    if component.name == "transformer-engine" and version is not None:
        return ComponentStatus(component.name, version, f"{component.use}; {_fp8_note(facts)}", "ok")
    if version is not None:
        return ComponentStatus(component.name, version, component.use, "ok")
    severity: Severity = "missing" if component.required else "optional"
    return ComponentStatus(component.name, "absent", component.without, severity)


def _fp8_note(facts: EnvironmentFacts) -> str:
    """The FP8 recipes that these GPUs support, or why they support none."""
    machine = replace(facts.accelerators, transformer_engine=facts.versions["transformer-engine"])
    obstacles = {recipe: fp8_obstacle(recipe, machine) for recipe in ("delayed", "tensorwise", "blockwise")}
    possible = [recipe for recipe, obstacle in obstacles.items() if obstacle is None]
    if not possible:
        return f"no FP8: {obstacles['delayed']}"
    return f"FP8 with model.fp8_recipe={' or '.join(possible)}"


def inspect_environment() -> EnvironmentFacts:
    """Inspect this machine. Of the packages only torch is imported, to list CUDA devices."""
    return EnvironmentFacts(
        python=platform.python_version(),
        versions={component.name: _version(component) for component in COMPONENTS},
        apex_is_nvidia=has_nvidia_apex(),
        accelerators=_accelerators(),
    )


def _accelerators() -> Accelerators:
    try:
        return find_accelerators()
    except (ImportError, OSError):  # no torch, or one whose libraries are missing
        return NO_ACCELERATORS


def _version(component: Component) -> str | None:
    found = installed_version(component.module, component.name)
    if found and component.name == "vllm":  # its CPU build is a package of another name
        return installed_vllm() or "unknown version"
    return found


def main(console: Console | None = None) -> int:
    """Print the table, and what is wrong with the GPUs for a run with default settings.

    Returns 1 if a required package is absent, or the GPUs cannot train such a run.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "version", "note"):
        table.add_column(column)
    style = {"ok": "green", "optional": "yellow", "missing": "bold red"}
    facts, console = inspect_environment(), console or Console()
    statuses, findings = check_components(facts), card_findings(facts.accelerators, CardNeeds())
    for status in statuses:
        table.add_row(status.name, status.state, status.note, style=style[status.severity])
    console.print(table)
    for finding in findings:
        console.print(
            f"{finding.sentence}.",
            style="bold red" if finding.fatal else "yellow",
            markup=False,
            soft_wrap=True,
        )
    missing = any(status.severity == "missing" for status in statuses)
    return int(missing or any(finding.fatal for finding in findings))
