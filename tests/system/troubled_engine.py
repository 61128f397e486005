"""Actors for the tests of the engine pool: an engine with faults, and a trainer that pushes weights."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import EngineStatus, Generation, GenerationRequest, SamplingParams
from megatron_fipo.weight_sync.object_store import push_weights

SAMPLING = SamplingParams(1.0, 1.0, 24)
HEALTH_S, STALL_S = 4.0, 10.0


class TroubledEngine(LocalEngine):
    """A local engine with faults that a test sets, each a number of times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.troubles: dict[str, int] = {}
        self.tokens = 0

    def pid(self) -> int:
        return os.getpid()

    def cause(self, trouble: str, times: int) -> None:
        self.troubles[trouble] = times
        self.tokens = 0

    def progress(self) -> int:
        """Tokens of each response since the last `cause`."""
        return self.tokens

    def _strikes(self, trouble: str) -> bool:
        self.troubles[trouble] = self.troubles.get(trouble, 0) - 1
        return self.troubles[trouble] >= 0

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        if self._strikes("slow"):
            time.sleep(1.5 * HEALTH_S)
        if self._strikes("stuck"):
            time.sleep(100 * STALL_S)
        if any("poison" in request.request_id for request in requests):
            raise ArithmeticError("never works")
        reply = super().generate(requests, sampling)
        if self._strikes("other weights"):
            return [replace(generation, weight_version=99) for generation in reply]
        if self._strikes("malformed"):
            return [
                replace(generation, log_probs=np.full_like(generation.log_probs, np.nan))
                for generation in reply
            ]
        return reply

    def status(self) -> EngineStatus:
        if self._strikes("no status"):
            return None  # type: ignore[return-value]
        return super().status()

    def _append(self, *args: Any) -> list[int]:
        if self._strikes("slow steps"):
            time.sleep(0.1)
        if self._strikes("very slow steps"):
            time.sleep(1.2 * STALL_S / SAMPLING.max_new_tokens)
        self.tokens += 1
        return super()._append(*args)


class TrainerRank:
    """In place of the trainer's rank 0: an actor that pushes new weights."""

    def push(self, folder: str, engines: dict, version: int) -> None:
        weights = load_file(Path(folder, "model.safetensors"))
        push_weights(iter(weights.items()), engines, version, bucket_bytes=10_000, timeout_s=60.0, check=True)
