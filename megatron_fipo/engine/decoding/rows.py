"""The responses of one call while they are decoded, and what both decoders share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_fipo.engine.protocol import GenerationRequest, SamplingParams

ABORTED = "abort"


@dataclass(eq=False)
class Row:
    """One response while it is decoded."""

    context: tuple[int, ...]
    """Prompt and prefix."""
    prefix: list[int]
    """The response before this call."""
    uniforms: np.ndarray
    """float64. One random number for each token that may still be sampled."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ABORTED
    """Until the last token sets it."""

    @classmethod
    def of(cls, request: GenerationRequest, limit: int) -> "Row":
        """Of a response of at most `limit` tokens, the prefix included."""
        prefix = request.prefix.tolist()
        uniforms = np.random.default_rng(request.seed).random(limit)[len(prefix) :]
        return cls((*request.prompt_ids, *prefix), prefix, uniforms)

    @property
    def finished(self) -> bool:
        return self.finish_reason != ABORTED


@dataclass
class Counts:
    """What an engine has computed since its process began."""

    computed: int = 0
    """Prompt and response tokens."""
    generated: int = 0
    """Response tokens among them."""
    prefix_queries: int = 0
    """Tokens of all requests' prompts and prefixes."""
    prefix_hits: int = 0
    """Those that another request of the same batch had too, so they were computed once."""
    running: int = 0
    """Rows in the batch that is being decoded."""

    def add_contexts(self, rows: Sequence[Row]) -> None:
        """Count a batch whose distinct contexts are computed once."""
        contexts = [row.context for row in rows]
        brought, computed = sum(map(len, contexts)), sum(map(len, set(contexts)))
        self.computed += computed
        self.prefix_queries += brought
        self.prefix_hits += brought - computed


Append = Callable[[Sequence[Row], Sequence[int], Sequence[float]], list[int]]
"""Adds one token and its log-prob to each row; returns the indices of the unfinished ones."""


class Decoder(Protocol):
    """Decodes the rows of one call."""

    def decode(self, rows: Sequence[Row], sampling: SamplingParams, append: Append) -> None:
        """Sample each row to its end, or until the engine is aborted; `append` decides where a row ends."""

    def release(self) -> None:
        """Free the device memory that is kept between calls."""
