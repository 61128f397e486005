"""`megatron-fipo` with local engines that garble one reply in eight: the program of the chaos test."""

import random
import sys
from dataclasses import replace

import numpy as np

import megatron_fipo.cli.main as cli
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.engine.registry import engine_type, register


def garble(reply: list[Generation], rng: random.Random) -> list[Generation]:
    """The same reply with its first response corrupted in one of the ways of a faulty engine."""
    first = reply[0]
    corrupted = rng.choice(
        [
            replace(first, log_probs=np.full_like(first.log_probs, np.nan)),
            replace(first, log_probs=first.log_probs[:-1]),
            replace(first, response_ids=first.response_ids[:0], log_probs=first.log_probs[:0]),
            replace(first, response_ids=-first.response_ids - 1),
            replace(first, weight_version=first.weight_version + 1),
            replace(first, finish_reason="error"),
        ]
    )
    return rng.choice([[corrupted, *reply[1:]], reply[1:]])


class GarblingEngine(LocalEngine):
    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        reply = super().generate(requests, sampling)
        rng = random.Random()
        return garble(reply, rng) if rng.random() < 1 / 8 else reply


if __name__ == "__main__":
    register(replace(engine_type("local"), load=lambda: GarblingEngine))
    sys.exit(cli.main())
