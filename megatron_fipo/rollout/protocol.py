"""What the training loop asks of a rollout engine, whatever runs inside it.

An engine is a Ray actor around a class with the methods of `RolloutEngine`. The loop holds only handles and these data classes,
so the engine on `transformers` and the one on vLLM are interchangeable by configuration.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

RAY_LOGS = "/tmp/ray/session_latest/logs"
"""Where Ray keeps what its processes print, unless its temporary folder was moved."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 means greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class GenerationRequest:
    """`n` responses to one prompt. The same `seed` and weights give the same responses."""

    request_id: str
    prompt_ids: tuple[int, ...]
    n: int
    seed: int


@dataclass(frozen=True)
class Generation:
    """One response: token ids with the end-of-sequence token where it was reached, and each token's log-probability.

    Log-probs are natural logs of the distribution after temperature and before top-p truncation: at temperature T it is the
    policy that the loss differentiates (the head applies the same temperature).
    """

    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    weight_version: int


class RolloutEngine(Protocol):
    """An engine. Weights arrive in Hugging Face names, between `begin_weight_update` and `finish_weight_update`."""

    def ready(self) -> None:
        """Return once the model is loaded; raises `UserError` when it can't be."""

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[list[Generation]]:
        """One list of `n` generations per request, in the order of `requests`."""

    def begin_weight_update(self) -> None: ...

    def load_weights(self, bucket: dict[str, torch.Tensor]) -> None:
        """Replace the named tensors in place. Raises `UserError` on an unknown name or another shape."""

    def finish_weight_update(self, version: int) -> str:
        """Adopt `version` and return the checksum of what the engine now holds (see `weight_sync.WeightChecksum`)."""
