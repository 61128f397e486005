"""What each engine did during an iteration: times and counters between two readings. No engines, Ray or clock.

Requests, KV cache and counters are known from health probes only (`fleet.PROBE_EVERY_S`): running and waiting requests and
the use of the KV cache are means over the probes whose answer shows a request. Counters are differences, and
what an engine counted after its last probe belongs to the next iteration, or is lost with the engine. Engines are also
probed before each push of weights, with no request outstanding, so busy time and counters of an iteration belong together.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_fipo.engine.protocol import NO_WEIGHTS, EngineStatus

MAX_LISTED_ENGINES = 16
"""With more engines only mean, minimum and maximum over them are logged."""
_NOTHING = EngineStatus(NO_WEIGHTS, tokens=0)


@dataclass(frozen=True)
class EngineUsage:
    """One engine during an iteration. None: the engine does not report it, or answered no probe that shows it."""

    idle: float
    """Share of the time without a request."""
    running: float | None
    """Requests in the batch that is being decoded."""
    waiting: float | None
    """Requests that wait in the engine for space in its KV cache."""
    kv_use: float | None
    """Share of the KV cache that running requests occupy."""
    preemptions: float | None
    """Requests stopped for lack of space in the KV cache."""
    prefix_hits: float | None
    """Share of prompt and prefix tokens that were not computed again."""
    decode_tokens_per_s: float | None
    """Sampled response tokens per second with a request, evaluations included."""


@dataclass(frozen=True)
class RolloutUsage:
    """Engines and scorers during an iteration."""

    engines: list[EngineUsage]
    """By number; empty without engines."""
    generated_tokens: int
    """Response tokens that the engines sampled for training."""
    scoring_s: float
    """Seconds in which scorers scored, added up over them."""


class UsageMeter:
    """Adds up the usage of one engine over calls, probes and restarts. Times in seconds of any clock."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._busy_since: float | None = None
        self._last = _NOTHING
        self._preemptions: int | None = None
        self._clear()

    def began(self, now: float) -> None:
        """The engine holds requests from now on."""
        self._busy_since = now

    def ended(self, now: float) -> None:
        """The engine holds none any more."""
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def lost(self, now: float) -> None:
        """The engine's process ended, and its counters with it: those of the next one begin at 0."""
        self.ended(now)
        self._last = _NOTHING

    def probed(self, status: EngineStatus) -> None:
        """The engine answered with its status."""
        last, self._last = self._last, status
        self._generated += status.generated_tokens - last.generated_tokens
        self._queries += status.prefix_queries - last.prefix_queries
        self._hits += status.prefix_hits - last.prefix_hits
        if status.preemptions is not None:
            self._preemptions = (self._preemptions or 0) + status.preemptions - (last.preemptions or 0)
        # Without a call its numbers may be old; with one the request may be on its way, or prefilled.
        if self._busy_since is not None and status.running + status.waiting > 0:
            self._samples.append(status)

    def take(self, now: float) -> EngineUsage:
        """The usage since the last `take`."""
        busy = self._busy_since is not None
        self.ended(now)
        usage = EngineUsage(
            idle=1.0 - self._busy_s / (now - self._since) if now > self._since else 0.0,
            running=_mean([float(status.running) for status in self._samples]),
            waiting=_mean([float(status.waiting) for status in self._samples]),
            kv_use=_mean([status.kv_use for status in self._samples if status.kv_use is not None]),
            preemptions=None if self._preemptions is None else float(self._preemptions),
            prefix_hits=self._hits / self._queries if self._queries else None,
            decode_tokens_per_s=self._generated / self._busy_s if self._busy_s else None,
        )
        self._since = now
        self._clear()
        if busy:
            self.began(now)
        return usage

    def _clear(self) -> None:
        self._busy_s = 0.0
        self._generated = self._queries = self._hits = 0
        self._preemptions = None
        self._samples: list[EngineStatus] = []


def usage_values(usages: Sequence[EngineUsage]) -> dict[str, float]:
    """Metrics over the engines that have a value: `engine_mean/...`.

    With more than one engine also `engine_min/...`, `engine_max/...`, and with up to `MAX_LISTED_ENGINES` each one's
    `engine_<number>/...`.
    """
    values: dict[str, float] = {}
    rows = [asdict(usage) for usage in usages]
    for name in rows[0] if rows else ():
        known = {number: row[name] for number, row in enumerate(rows) if row[name] is not None}
        if not known:
            continue
        values[f"engine_mean/{name}"] = sum(known.values()) / len(known)
        if len(rows) > 1:
            values[f"engine_min/{name}"] = min(known.values())
            values[f"engine_max/{name}"] = max(known.values())
        if 1 < len(rows) <= MAX_LISTED_ENGINES:
            values |= {f"engine_{number}/{name}": value for number, value in known.items()}
    return values


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
