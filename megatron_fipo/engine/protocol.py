"""What the training loop asks of a rollout engine, whatever runs inside it.

An engine is a Ray actor around a class with the methods of `RolloutEngine`. The loop holds only handles and these data classes,
so the engine on `transformers` and the one on vLLM are interchangeable by configuration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

RAY_LOGS = "/tmp/ray/session_latest/logs"
"""Where Ray keeps what its processes print, unless its temporary folder was moved."""
NO_WEIGHTS = -1
"""The version of an engine that has no weights yet."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 means greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    """Length limit of a response, its prefix included."""


@dataclass(frozen=True)
class GenerationRequest:
    """One response to one prompt. The same `seed` and weights give the same response."""

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    prefix: tuple[int, ...] = ()
    """The response so far, from an earlier call that was aborted; generation goes on behind it. Shorter than the limit."""


@dataclass(frozen=True)
class Generation:
    """What one call added to a response: token ids, with the end-of-sequence token where it was reached, and their log-probs.

    Log-probs are natural logs of the distribution after temperature and before top-p truncation: at temperature T it is the
    policy that the loss differentiates (the head applies the same temperature).
    """

    response_ids: tuple[int, ...]
    """Without the request's prefix. Empty only after an abort."""
    log_probs: tuple[float, ...]
    finish_reason: str
    """`stop` (end-of-sequence token seen), `length` (response limit reached) or `abort` (not finished)."""
    weight_version: int
    """Of all these tokens: weights never change within a call."""


class RolloutEngine(Protocol):
    """An engine. Weights arrive in Hugging Face names, between `begin_weight_update` and `finish_weight_update`.

    `generate` may run `calls_at_once` times concurrently; all other methods answer while it runs. No weight update runs beside it.
    """

    requests_per_call: ClassVar[int]
    """How many requests a call of `generate` should carry."""
    calls_at_once: ClassVar[int]
    """How many calls of `generate` keep the engine busy."""

    def ready(self) -> None:
        """Return once the model is loaded; raises `UserError` when it can't be."""

    def ping(self) -> int:
        """The weight version served, at once, whatever else runs. The health probe."""

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """One generation per request, in the order of `requests`."""

    def abort(self) -> None:
        """Make every running `generate` return soon; unfinished responses come back as they are, with `finish_reason` `abort`."""

    def begin_weight_update(self, check: bool) -> None:
        """Take tensors until `finish_weight_update`, and checksums of them with `check`. Beginning again forgets a broken update."""

    def load_weights(self, bucket: "dict[str, torch.Tensor]") -> None:
        """Replace the named tensors in place. Raises `UserError` on an unknown name or another shape."""

    def finish_weight_update(self, version: int) -> dict[str, str]:
        """Adopt `version`. If the update began with `check`, return the sha256 of each tensor taken, by name
        (`weight_sync.tensor_checksum`), else {}."""

    def sleep(self) -> None:
        """Give device memory back (weights and KV cache) until `wake`; weights have to come anew then.

        Nothing to do where no GPU is shared with the trainer.
        """

    def wake(self) -> None: ...
