"""Which nodes, pairs of nodes or clocks are at fault: pure functions over the exchanges of all nodes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from megatron_fipo.errors import listed
from megatron_fipo.node.preflight.facts import Fault, Measurements, NetworkFacts
from megatron_fipo.node.preflight.limits import PreflightLimits

Pair = tuple[str, str]


@dataclass(frozen=True)
class PairSpeed:
    """What a pair of nodes reaches over all its GPUs together."""

    gb_per_s: float
    """0 if an exchange failed."""
    error: str | None


def judge_network(found: Measurements, limits: PreflightLimits) -> Iterator[Fault]:
    """Faults of links, clocks and the all-reduce."""
    speeds = pair_speeds(found)
    nodes = tuple(name for name in found.names if name in found.network)
    least = limits.min_bandwidth_gb_per_s
    slow = {pair for pair, speed in speeds.items() if speed.error or speed.gb_per_s < least}
    link_faults = list(_link_faults(nodes, speeds, slow, least))
    yield from link_faults
    yield from _clock_faults(found, limits)
    if not link_faults:
        yield from _all_reduce_faults(found.network, limits)


def pair_speeds(found: Measurements) -> dict[Pair, PairSpeed]:
    """By pair of nodes that met: the sum over their GPUs of the slower end's measurement."""
    ends: dict[tuple[str, str, int], list[float]] = {}
    errors: dict[Pair, str] = {}
    for facts in found.network.values():
        for link in facts.links:
            ends.setdefault((link.a, link.b, link.local_rank), []).append(link.gb_per_s or 0.0)
            if link.error is not None:
                errors.setdefault((link.a, link.b), link.error)
    speeds: dict[Pair, float] = {}
    for (a, b, _), values in ends.items():
        speeds[a, b] = speeds.get((a, b), 0.0) + min(values)
    return {
        pair: PairSpeed(0.0 if pair in errors else speed, errors.get(pair)) for pair, speed in speeds.items()
    }


def slow_nodes(nodes: tuple[str, ...], met: set[Pair], slow: set[Pair]) -> tuple[str, ...]:
    """The nodes that are slow with most of the others that they met, in the order of `nodes`.

    The one with the largest share of slow pairs is taken out first, so that its pairs do not count against its
    peers. Of two remaining nodes none is named: their pair alone does not tell which.
    """
    remaining, bad = list(nodes), set()
    while len(remaining) > 2:
        shares = {}
        for node in remaining:
            own = [pair for pair in met if node in pair and set(pair) <= set(remaining)]
            shares[node] = sum(pair in slow for pair in own) / len(own) if own else 0.0
        worst = max(remaining, key=shares.__getitem__)
        if shares[worst] <= 0.5:
            break
        remaining.remove(worst)
        bad.add(worst)
    return tuple(node for node in nodes if node in bad)


def _link_faults(
    nodes: tuple[str, ...], speeds: Mapping[Pair, PairSpeed], slow: set[Pair], least: float
) -> Iterator[Fault]:
    met = set(speeds)
    if len(nodes) > 2 and slow == met and len(met) == len(list(combinations(nodes, 2))):
        fastest = max(speeds.values(), key=lambda speed: speed.gb_per_s)
        failed = f" (an exchange that failed: {fastest.error})" if fastest.error else ""
        yield Fault(
            nodes,
            "network",
            f"every pair of nodes is slow: the fastest reaches {fastest.gb_per_s:.3g} GB/s{failed}, {least:g} are needed "
            "(--min-bandwidth-gb-per-s); the traffic takes the wrong network: set NCCL_IB_HCA, NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME",
            exclude=False,
        )
        return
    bad = slow_nodes(nodes, met, slow)
    for node in bad:
        own = [pair for pair in met if node in pair]
        partners = [pair for pair in own if pair in slow]
        median = sorted(speeds[pair].gb_per_s for pair in own)[len(own) // 2]
        errors = [error for pair in partners if (error := speeds[pair].error)]
        reason = f" ({len(errors)} exchanges failed, the first with: {errors[0]})" if errors else ""
        yield Fault(
            (node,),
            "network",
            f"{node} is slow with {len(partners)} of {len(own)} nodes: half of its pairs reach at most {median:.3g} GB/s, "
            f"{least:g} are needed (--min-bandwidth-gb-per-s){reason}; exclude it, and check its network adapters and cables",
        )
    for pair in sorted(pair for pair in slow if not set(pair) & set(bad)):
        speed, both = speeds[pair], " and ".join(pair)
        if speed.error:
            yield Fault(
                pair,
                "network",
                f"{both} cannot exchange data: {speed.error}; check that they reach each other (and GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME if set), or exclude one of them",
            )
        else:
            yield Fault(
                pair,
                "network",
                f"{both} exchange {speed.gb_per_s:.3g} GB/s, {least:g} are needed (--min-bandwidth-gb-per-s); check the path "
                "between them, or exclude one of them",
            )


def _clock_faults(found: Measurements, limits: PreflightLimits) -> Iterator[Fault]:
    allowed = limits.max_clock_skew_s
    for clock in found.network.get(found.head, NetworkFacts()).clocks:
        if allowed and abs(clock.seconds) - clock.uncertainty > allowed:
            direction = "ahead of" if clock.seconds > 0 else "behind"
            yield Fault(
                (clock.node,),
                "clock",
                f"the clock of {clock.node} is {abs(clock.seconds):.3g} s {direction} that of {found.head}, {allowed:g} s are "
                "allowed (--max-clock-skew-s); start time synchronisation (chrony or ntpd) there",
            )


def _all_reduce_faults(network: Mapping[str, NetworkFacts], limits: PreflightLimits) -> Iterator[Fault]:
    """Only if all pairs are fast: a slow pair slows the all-reduce too."""
    failed = {name: facts.failure for name, facts in network.items() if facts.failure}
    if failed:
        names = tuple(failed)
        yield Fault(
            names,
            "network",
            f"the exchanges ended early on {listed(names, 4)}: {failed[names[0]]} (all exchanges may take "
            f"{limits.exchange_time_s(len(network)):g} s, --network-timeout-s); run again with NCCL_DEBUG=INFO",
            exclude=len(names) < len(network),
        )
        return
    measured = [facts.all_reduce_gb_per_s for facts in network.values() if facts.all_reduce_gb_per_s]
    least = limits.min_all_reduce_gb_per_s
    if measured and min(measured) < least:
        yield Fault(
            tuple(network),
            "all-reduce",
            f"an all-reduce over all nodes reaches {min(measured):.3g} GB/s of bus bandwidth, {least:g} are needed "
            "(--min-all-reduce-gb-per-s) although each pair is fast; check NCCL_ALGO, NCCL_NET_PLUGIN and the switches",
            exclude=False,
        )
