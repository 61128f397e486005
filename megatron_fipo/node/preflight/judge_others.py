"""Which nodes differ from the others, or do not share the run's folder with the head: pure functions."""

from collections import Counter
from collections.abc import Iterator, Mapping

from megatron_fipo.config.card_rules import CardNeeds, card_findings, together
from megatron_fipo.node.preflight.facts import Fault, Measurements


def judge_differences(found: Measurements) -> Iterator[Fault]:
    """Nodes that differ from most others in the number of GPUs or in a version."""
    counts = {
        name: f"{len(facts.gpus.by_torch)} GPUs by torch"
        + ("" if facts.gpus.listed is None else f" and {len(facts.gpus.listed)} by nvidia-smi")
        for name, facts in found.nodes.items()
        if facts.gpus
    }
    yield from _deviating(counts, "GPU difference", "exclude the node")
    versions = {name: facts.versions for name, facts in found.nodes.items() if facts.versions}
    for package in dict.fromkeys(package for installed in versions.values() for package in installed):
        values = {
            name: f"{package} {installed.get(package, 'absent')}" for name, installed in versions.items()
        }
        yield from _deviating(values, "versions", "use the same environment or image on all nodes")


def card_warnings(found: Measurements) -> list[str]:
    """What `train` would report about the GPUs of all nodes together, and is no fault."""
    known = [
        facts.gpus.accelerators for facts in found.nodes.values() if facts.gpus and facts.gpus.accelerators
    ]
    findings = card_findings(together(known), CardNeeds()) if known else []
    return [finding.sentence for finding in findings if not finding.fatal]


def judge_shared_folder(found: Measurements) -> Iterator[Fault]:
    """Nodes that do not see what the head writes, or whose files it does not see."""
    shared = any(failure is None for name, failure in found.canary.items() if name != found.head)
    for name, failure in found.canary.items():
        if failure is not None and name == found.head:
            yield Fault(
                (name,),
                "shared folder",
                f"{name} cannot write and read {found.shared_folder}: {failure}; fix the folder, or choose another run_dir",
                exclude=False,
            )
        elif failure is not None:
            yield Fault(
                (name,),
                "shared folder",
                f"{name} does not share {found.shared_folder} with {found.head}: {failure}; mount the same file system on all "
                "nodes, or choose a run_dir on one that is shared",
                exclude=shared,  # if no other node sees it, the folder itself is at fault
            )


def common_value(values: Mapping[str, str]) -> str:
    """What most nodes have; of equally frequent values the one that comes first, the head's if it is one of them."""
    return Counter(values.values()).most_common(1)[0][0]


def _deviating(values: Mapping[str, str], check: str, fix: str) -> Iterator[Fault]:
    if not values:
        return
    common = common_value(values)
    others = "most nodes have" if len(values) > 2 else "the other node has"
    for name, value in values.items():
        if value != common:
            yield Fault((name,), check, f"{name} has {value}, {others} {common}; {fix}")
