"""The interface between the driver and a rollout engine.

An engine is a Ray actor around a class with the methods of `RolloutEngine`. The driver has only actor handles
and these data classes, so `engine.registry` can exchange one engine for another by configuration. Imported by
the driver: no torch here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fipo.config.schema import EvaluationConfig, RolloutConfig

NO_WEIGHTS = -1
"""The version of an engine that has no weights yet."""
NO_TOKENS = np.empty(0, dtype=np.int32)
NO_LOG_PROBS = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. `temperature` 0 means greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    """Length limit of a response, including its prefix."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 for all."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the most likely token's; 0 for all tokens."""
    stop: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings in its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, in addition to the model's end-of-sequence tokens."""

    @classmethod
    def of(
        cls, settings: "RolloutConfig | EvaluationConfig", max_new_tokens: int, stop: tuple[str, ...]
    ) -> "SamplingParams":
        """The sampling that a section of the configuration names; `stop` is `rollout.stop` for both."""
        return cls(settings.temperature, settings.top_p, max_new_tokens, settings.top_k, settings.min_p, stop)


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One response to one prompt. The same `seed` and weights give the same response, on vLLM with `deterministic` only."""

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    prefix: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """int32. The response so far, from an earlier call that was aborted, or with observations; generation continues after it.
    Shorter than the limit."""
    routed: int = 0
    """Tokens of prompt and prefix, from the first on, whose routes are known from earlier calls."""


@dataclass(frozen=True, eq=False)
class Generation:
    """Token ids that one call added to a response, those that end it included, and their log-probs.

    Log-probs are natural logs of the distribution after temperature and before truncation (top-p, top-k, min-p): at
    temperature T it is the policy that the loss differentiates (the head applies the same temperature). Only those of
    training are used; at another temperature (evaluation) an engine may give those of training's.

    Arrays, because Ray passes them without a copy: the driver reads them in its node's object store.
    """

    response_ids: np.ndarray
    """int32 [tokens], without the request's prefix. Empty only after an abort."""
    log_probs: np.ndarray
    """float32 [tokens]."""
    finish_reason: str
    """`stop` (end-of-sequence token, stop token or stop string), `length` (response limit reached) or `abort` (not
    finished)."""
    weight_version: int
    """Of all these tokens: weights never change within a call."""
    routes: np.ndarray | None = None
    """uint8 or uint16 [tokens, layers, k]: the experts that the engine used for each token of prompt, prefix and response from
    `request.routed` on, up to the last but one (the last is not computed). Layers without experts are undefined. Fewer tokens
    if the last ones are not known. None if the engine does not report them, or `model.router.replay` does not need them."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were sampled from the policy."""
        return len(self.response_ids)

    @classmethod
    def not_started(cls, weight_version: int) -> "Generation":
        """The answer to a request that was aborted before its first token."""
        return cls(NO_TOKENS, NO_LOG_PROBS, "abort", weight_version)


@dataclass(frozen=True)
class EngineStatus:
    """What an engine reports to a health probe."""

    weight_version: int
    """`NO_WEIGHTS` before there are weights."""
    tokens: int
    """Prompt and response tokens computed since the process began. An engine that holds requests and computes
    none hangs."""
    waiting: int = 0
    """Requests that the engine holds and does not run, for lack of space in its KV cache."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds; None if it grows as needed."""
    running: int = 0
    """Requests in the batch that is being decoded."""
    kv_use: float | None = None
    """Share of the KV cache that running requests occupy."""
    generated_tokens: int = 0
    """Response tokens sampled since the process began."""
    preemptions: int | None = None
    """Requests stopped for lack of space in the KV cache and computed again later, since the process began."""
    prefix_queries: int = 0
    """Tokens of prompts and prefixes that requests brought since the process began."""
    prefix_hits: int = 0
    """Those of `prefix_queries` that were not computed again, because an earlier request began with them."""


class RolloutEngine(Protocol):
    """An engine.

    Weights arrive under Hugging Face names, between `begin_weight_update` and `finish_weight_update`.

    Up to `calls_at_once` calls of `generate` may run concurrently; all other methods return while it runs. No
    weight update runs concurrently with it.
    """

    requests_per_call: ClassVar[int]
    """How many requests a call of `generate` should carry."""
    calls_at_once: ClassVar[int]
    """How many calls of `generate` keep the engine busy."""

    def ready(self) -> EngineStatus:
        """Return once the model is loaded. Raises `UserError` if it can't be."""

    def status(self) -> EngineStatus:
        """Health probe: return at once, whatever else runs."""

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """One generation per request, in the order of `requests`."""

    def abort(self) -> None:
        """Make every running `generate` return soon, with finish reason `abort` for unfinished responses."""

    def begin_weight_update(self, check: bool) -> None:
        """Accept tensors until `finish_weight_update`; with `check`, also compute their checksums.

        Calling it again discards an incomplete update.
        """

    def load_weights(self, bucket: "dict[str, Tensor]") -> None:
        """Replace the named tensors in place. Raises `UserError` on an unknown name or another shape."""

    def finish_weight_update(self, version: int) -> dict[str, str]:
        """Adopt `version`.

        If the update began with `check`, return the checksum of each received tensor by name
        (`weight_sync/checksum.py`), else {}.
        """

    def sleep(self) -> None:
        """Free device memory (weights and KV cache) until `wake`; the weights must then be sent again.

        Does nothing if no GPU is shared with the trainer.
        """

    def wake(self) -> None: ...
