"""How many sequences fit into an engine's KV cache, from the lengths of those that have finished."""

import math
from dataclasses import dataclass

from megatron_fipo.engine.protocol import EngineStatus

USED_SHARE = 0.9
"""Of the KV cache. Above it vLLM interrupts sequences and computes their keys and values again later."""
ASSUMED = 4
"""Sequences of the longest length that are assumed to have finished before the first."""
REMEMBERED = 4096
"""Finished sequences that decide; responses grow over a training run, so older ones count less and less."""


@dataclass
class KVBudget:
    """Lengths of finished sequences, and the number of running ones that they let an engine hold.

    A sequence of prompt P and response R holds P + t tokens after t of its R steps. On average over the steps
    of all sequences that is (E[P R] + E[R²] / 2) / E[R].

    Example: half of the responses have 100 tokens, half have 900, prompts have none. Then E[R] = 500,
    E[R²] = 410,000, and a running sequence holds 410 tokens on average: more than half of the mean length,
    because the long ones run longer.
    """

    longest: int
    """Longest prompt plus longest response."""

    def __post_init__(self) -> None:
        # As if a few sequences of the longest length had finished: the first to finish are the shortest.
        self._count = float(ASSUMED)
        self._held = ASSUMED * self.longest**2 / 2
        """Sum of P R + R² / 2."""
        self._steps = float(ASSUMED * self.longest)
        """Sum of R."""

    def finished(self, prompt: int, response: int) -> None:
        """A sequence finished with these numbers of tokens."""
        keep = 1.0 if self._count < REMEMBERED else 1 - 1 / REMEMBERED
        self._count = keep * self._count + 1
        self._held = keep * self._held + prompt * response + response * response / 2
        self._steps = keep * self._steps + response

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of tokens that a running sequence holds; half of the longest while none has finished."""
        return self._held / self._steps

    def sequences(self, kv_tokens: int | None) -> float:
        """How many sequences an engine with space for `kv_tokens` tokens should run; inf for None, at least 1."""
        if kv_tokens is None:
            return math.inf
        return max(1.0, USED_SHARE * kv_tokens / self.tokens_per_sequence)

    def space(self, status: EngineStatus, requests: int) -> float:
        """Further requests that an engine with `requests` unfinished ones can run. The others wait in the driver, not in its
        queue."""
        return 0.0 if status.waiting else self.sequences(status.kv_tokens) - requests
