"""What is wrong with the GPUs of a machine, or of a run's ranks, for training. Pure: facts and settings are arguments.

`train`, `doctor` and `preflight` use the same functions. Memory is judged in `plan/card_memory.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_fipo.environment import Accelerators, Card, Driver, dotted
from megatron_fipo.errors import UserError
from megatron_fipo.objective.kernels import OLDEST_CAPABILITY

GIB = 2**30
SAME_MEMORY = 0.02
"""Cards of one model whose memory differs by less than this share are alike: error correction takes a little of it."""
BFLOAT16_CAPABILITY = (8, 0)
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""First driver branch on Linux that runs programs built for a CUDA major version (NVIDIA's table of minor-version
compatibility)."""
CHOOSE = "choose GPUs of one kind by CUDA_VISIBLE_DEVICES"
CUDA_BUILD = "make venv TORCH_INDEX=https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True)
class Finding:
    """Something about the GPUs that a user should know."""

    sentence: str
    """With the fix, without a full stop."""
    fatal: bool
    """Whether training is refused; otherwise it is reported once, at the start."""


@dataclass(frozen=True)
class CardNeeds:
    """The settings that decide what a GPU must be able to do. The defaults are those of a run."""

    dtype: str = "bfloat16"
    """`model.dtype`."""
    kernels: str = "auto"
    """`head.kernels`."""
    deterministic: bool = False


def card_findings(machine: Accelerators, needs: CardNeeds) -> list[Finding]:
    """What is wrong with these GPUs for a run with these settings."""
    found = (_unused(machine), _bfloat16(machine, needs), _triton(machine, needs), _mixed(machine, needs))
    return [finding for finding in found if finding is not None]


def check_cards(findings: Iterable[Finding]) -> list[str]:
    """The sentences to report. UserError with the first that is fatal."""
    found = list(findings)
    for finding in found:
        if finding.fatal:
            raise UserError(finding.sentence)
    return [finding.sentence for finding in found]


def together(machines: Sequence[Accelerators]) -> Accelerators:
    """The GPUs of several processes as one; packages and driver are those of the first without a GPU, or of the first."""
    cards = tuple(card for machine in machines for card in machine.cards)
    first = next((machine for machine in machines if not machine.cards), machines[0])
    capability = min((card.capability for card in cards), default=None)
    return replace(
        first, cards=cards, capability=capability, triton=all(machine.triton for machine in machines)
    )


def smallest(cards: Sequence[Card]) -> Card:
    """The card with the least memory."""
    return min(cards, key=lambda card: card.memory_bytes)


def _unused(machine: Accelerators) -> Finding | None:
    """A machine with NVIDIA's driver whose GPUs torch cannot use: training would run on CPU cores."""
    driver = machine.unused_driver
    if driver is None:
        return None
    gpus = f"{driver.gpus} GPU{'s' if driver.gpus > 1 else ''} with driver {driver.version}"
    if machine.cuda is None:
        return Finding(
            f"this machine has {gpus}, but torch is built without CUDA, so training runs on CPU cores; for the GPUs install a "
            f"build for CUDA ({CUDA_BUILD})",
            fatal=False,
        )
    reason, fix = _driver_fault(driver, machine.cuda)
    return Finding(
        f"this machine has {gpus}, but torch, built for CUDA {machine.cuda}, can use none: {reason}; {fix}, or set "
        "CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores",
        fatal=True,
    )


def _driver_fault(driver: Driver, cuda: str) -> tuple[str, str]:
    """Why torch cannot use a driver, and the fix."""
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0]))
    branch = driver.version.partition(".")[0]
    if least is not None and branch.isdigit() and int(branch) < least:
        return (
            f"that CUDA needs driver {least} or later",
            "update the driver, or install torch for an older CUDA (make venv TORCH_INDEX=...)",
        )
    return (
        "the driver does not answer, or this process may not use the GPUs",
        "look at nvidia-smi, start a container with --gpus all, or request GPUs from the scheduler",
    )


def _bfloat16(machine: Accelerators, needs: CardNeeds) -> Finding | None:
    if needs.dtype != "bfloat16" or machine.capability is None or machine.capability >= BFLOAT16_CAPABILITY:
        return None
    return Finding(
        f"model.dtype=bfloat16 needs GPUs of compute capability {dotted(BFLOAT16_CAPABILITY)} (Ampere) or later, and "
        f"{_oldest(machine)}; set model.dtype=float32, or {CHOOSE if _differ(machine.cards) else 'use a newer GPU'}",
        fatal=True,
    )


def _triton(machine: Accelerators, needs: CardNeeds) -> Finding | None:
    """With `auto` plain torch takes the place of Triton, which the rank's line about head and loss reports."""
    if needs.kernels != "triton" or machine.capability is None:
        return None
    if not machine.triton:
        return Finding(
            "head.kernels=triton needs Triton, which is not installed; pip install triton, or set head.kernels=auto",
            fatal=True,
        )
    if machine.capability < OLDEST_CAPABILITY:
        return Finding(
            f"head.kernels=triton needs GPUs of compute capability {dotted(OLDEST_CAPABILITY)} or later, and {_oldest(machine)}; "
            "set head.kernels=auto",
            fatal=True,
        )
    return None


def _mixed(machine: Accelerators, needs: CardNeeds) -> Finding | None:
    """Different cards work, but ranks proceed together, and other cards choose other kernels, which round differently."""
    if not _differ(machine.cards):
        return None
    kinds = [f"{card.name} ({card.memory_bytes / GIB:.0f} GiB)" for card in machine.cards]
    listed = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    if needs.deterministic:
        return Finding(
            f"deterministic=true needs GPUs of one kind, since others round differently and a resumed run may get them in another "
            f"order, but there are {listed}; {CHOOSE}, or set deterministic=false",
            fatal=True,
        )
    return Finding(
        f"the GPUs differ ({listed}): ranks proceed together, so the slowest sets the pace, and the smallest decides what fits; "
        f"{CHOOSE} if that is not intended",
        fatal=False,
    )


def _differ(cards: Sequence[Card]) -> bool:
    if not cards:
        return False
    least, most = (choice(card.memory_bytes for card in cards) for choice in (min, max))
    return len({card.name for card in cards}) > 1 or least < (1 - SAME_MEMORY) * most


def _oldest(machine: Accelerators) -> str:
    """Which GPU has the lowest capability, as a clause."""
    assert machine.capability is not None
    name = next(
        (card.name for card in machine.cards if card.capability == machine.capability), "the oldest GPU"
    )
    return f"{name} has {dotted(machine.capability)}"
