"""Whether the GPUs at hand can train a run: of this machine before Ray starts, or of the ranks before they build the model."""

from collections.abc import Sequence

from megatron_fipo.config import Config, with_placement
from megatron_fipo.config.card_rules import CardNeeds, Finding, card_findings, check_cards, together
from megatron_fipo.environment import Accelerators, Machine
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.card_memory import machine_of, memory_findings
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.workload import Assumptions


def judge_machine(config: Config, machine: Machine) -> list[str]:
    """`judge_cards` for the GPUs of this machine, as `this_machine` found them."""
    assert machine.accelerators is not None
    return judge_cards(with_placement(config, machine.gpus), [machine.accelerators])


def judge_cards(config: Config, found: Sequence[Accelerators]) -> list[str]:
    """The sentences to report about the GPUs of some processes, for a configuration whose placement is decided.

    UserError if they cannot train it.
    """
    cards = together(found)
    needs = CardNeeds(config.model.dtype, config.head.kernels, config.deterministic)
    return check_cards([*card_findings(cards, needs), *_memory(config, cards)])


def _memory(config: Config, found: Accelerators) -> list[Finding]:
    if not found.cards:
        return []
    family, architecture = read_model_config(config.model.path)
    # All groups informative: only the lengths of responses matter to memory.
    case = Case(config, family, architecture, machine_of(found.cards), Assumptions(informative=1.0))
    return memory_findings(case, found.cards)
