"""Which nodes are at fault: pure functions from measurements and limits to sentences."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_fipo.config.card_rules import CardNeeds, card_findings
from megatron_fipo.node.preflight.facts import (
    Fault,
    Gpu,
    Gpus,
    Measurements,
    NodeFacts,
    ProcessLimits,
    Product,
    Space,
)
from megatron_fipo.node.preflight.judge_network import judge_network
from megatron_fipo.node.preflight.judge_others import judge_differences, judge_shared_folder
from megatron_fipo.node.preflight.limits import PreflightLimits

SET_UP = ("GPU count", "GPU fitness", "space", "limits")
"""Faults that lie in the image, the job script or the request if all nodes have them: other nodes would have them too."""
CHECKS = {
    "gpus": "the inspection of its GPUs",
    "products": "the matrix product",
    "space": "the look at the free space of /tmp and /dev/shm",
    "limits": "the look at its ulimits",
    "versions": "the look at installed versions",
}


def judge(found: Measurements, limits: PreflightLimits) -> list[Fault]:
    """All faults, those of missing nodes first."""
    faults = [
        *_missing(found, limits),
        *(fault for name, facts in found.nodes.items() for fault in _judge_node(name, facts, limits)),
        *judge_differences(found),
        *judge_network(found, limits),
        *judge_shared_folder(found),
    ]
    return [_without_exclusion_of_all(fault, faults, found) for fault in faults]


def bad_nodes(faults: Iterable[Fault], names: Iterable[str]) -> list[str]:
    """The nodes to exclude, in the order of `names`."""
    bad = {name for fault in faults if fault.exclude for name in fault.nodes}
    return [name for name in names if name in bad]


def _without_exclusion_of_all(fault: Fault, faults: list[Fault], found: Measurements) -> Fault:
    alike = {name for other in faults if other.check == fault.check for name in other.nodes}
    common = fault.check in SET_UP and alike == set(found.nodes)
    return replace(fault, exclude=False) if common else fault


def _missing(found: Measurements, limits: PreflightLimits) -> Iterator[Fault]:
    for name in found.names:
        if name not in found.nodes:
            yield Fault(
                (name,),
                "answer",
                f"{name} did not answer in {limits.join_timeout_s:g} s: it is down, cannot start Python, or cannot reach "
                f"{found.head}; log in there, or exclude it",
            )
        elif name not in found.network:
            yield Fault(
                (name,),
                "answer",
                f"{name} answered at first but did not finish its exchanges with other nodes; log in there, or exclude it",
            )


def _judge_node(name: str, facts: NodeFacts, limits: PreflightLimits) -> Iterator[Fault]:
    findings = [
        *_judge_failures(facts.failures, limits),
        *(_judge_gpus(facts.gpus, limits) if facts.gpus else ()),
        *_judge_products(facts.products or ()),
        *_judge_space(facts.space or (), limits),
        *(_judge_limits(facts.limits, limits) if facts.limits else ()),
    ]
    yield from (Fault((name,), check, f"{name}: {sentence}") for check, sentence in findings)


def _judge_failures(failures: dict[str, str], limits: PreflightLimits) -> Iterator[tuple[str, str]]:
    for check, reason in failures.items():
        yield (
            f"{check} failed",
            f"{CHECKS[check]} gave no result, with {limits.check_timeout_s:g} s allowed: {reason}; look at this node, or "
            "exclude it",
        )


def _judge_gpus(gpus: Gpus, limits: PreflightLimits) -> Iterator[tuple[str, str]]:
    if gpus.smi_error is not None:
        yield (
            "GPU health",
            f"nvidia-smi failed: {gpus.smi_error}; reset or replace the GPU, or exclude the node",
        )
    wanted = limits.gpus_per_node
    if wanted and (len(gpus.by_torch) < wanted or (gpus.listed is not None and len(gpus.listed) < wanted)):
        smi = "" if gpus.listed is None else f" and nvidia-smi lists {len(gpus.listed)}"
        yield (
            "GPU count",
            f"torch sees {len(gpus.by_torch)} GPUs{smi}, of {wanted} requested; a GPU has failed, is not in the allocation, "
            "or torch is built without CUDA: exclude the node, or fix the request or torch",
        )
    if gpus.accelerators is not None:
        needs = CardNeeds(limits.dtype)
        yield from (
            ("GPU fitness", finding.sentence)
            for finding in card_findings(gpus.accelerators, needs)
            if finding.fatal
        )
    for gpu in gpus.listed or ():
        yield from (("GPU health", sentence) for sentence in _judge_gpu(gpu))
    for xid in gpus.xids or ():
        if xid.hours_ago <= limits.xid_hours:
            yield (
                "GPU health",
                f"the kernel log has XID {xid.code} of GPU {xid.device} {xid.hours_ago:.1f} hours ago, none is allowed in "
                f"{limits.xid_hours:g} hours (--xid-hours); reset or replace the GPU, or exclude the node",
            )


def _judge_gpu(gpu: Gpu) -> Iterator[str]:
    if gpu.uncorrected_ecc:
        yield (
            f"GPU {gpu.index} has {gpu.uncorrected_ecc} uncorrected memory errors, 0 are allowed; reset it "
            "(nvidia-smi --gpu-reset), or exclude the node"
        )
    if gpu.remap_failed:
        yield f"GPU {gpu.index} could not remap a row of its memory; replace it, or exclude the node"
    elif gpu.remap_pending:
        yield (
            f"GPU {gpu.index} has memory rows that wait to be remapped; reset it (nvidia-smi --gpu-reset), or exclude the node"
        )


def _judge_products(products: Iterable[Product]) -> Iterator[tuple[str, str]]:
    for product in products:
        if product.wrong:
            yield (
                "product",
                f"a matrix product on {product.device} has {product.wrong:,} wrong elements of {product.elements:,}, "
                f"{product.nan:,} of them NaN, 0 are allowed; exclude the node and have the device replaced",
            )


def _judge_space(spaces: Iterable[Space], limits: PreflightLimits) -> Iterator[tuple[str, str]]:
    rules = {
        "/tmp": (limits.min_tmp_gib, "--min-tmp-gib", "delete files there"),
        "/dev/shm": (
            limits.min_shm_gib,
            "--min-shm-gib",
            "delete files there, or give a container more shared memory",
        ),
    }
    for space in spaces:
        least, option, fix = rules[space.path]
        if space.free_gib < least:
            yield (
                "space",
                f"{space.path} has {space.free_gib:g} GiB free, {least:g} are needed ({option}); {fix}",
            )


def _judge_limits(process: ProcessLimits, limits: PreflightLimits) -> Iterator[tuple[str, str]]:
    if process.open_files is not None and process.open_files < limits.min_open_files:
        most = process.open_files_most
        if most is None or most >= limits.min_open_files:
            fix = f"put ulimit -n {limits.min_open_files} into the job script"
        else:
            fix = f"have the administrator raise the hard limit, which is {most}"
        yield (
            "limits",
            f"a process may open {process.open_files} files (ulimit -n), {limits.min_open_files} are needed "
            f"(--min-open-files); {fix}",
        )
    locked = process.locked_memory_gib
    if process.rdma_devices and locked is not None and locked < limits.min_locked_memory_gib:
        yield (
            "limits",
            f"a process may lock {locked:.3g} GiB of memory (ulimit -l), RDMA needs {limits.min_locked_memory_gib:g} "
            "(--min-locked-memory-gib); put ulimit -l unlimited into the job script, or have the administrator allow it",
        )
