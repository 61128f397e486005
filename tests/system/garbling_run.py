"""`megatron-fipo` with local engines of which one reply in eight is garbage of some kind: what the chaos test runs."""

import random
import sys
from dataclasses import replace

import megatron_fipo.cli.main as cli
from megatron_fipo.driver import cluster
from megatron_fipo.driver import train as run
from megatron_fipo.engine.local import LocalEngine
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams


def garble(reply: list[Generation], rng: random.Random) -> list[Generation]:
    """The same reply with its first response spoilt in one of the ways that a sick engine has."""
    first = reply[0]
    spoilt = rng.choice(
        [
            replace(first, log_probs=(float("nan"),) * len(first.log_probs)),
            replace(first, log_probs=first.log_probs[:-1]),
            replace(first, response_ids=(), log_probs=()),
            replace(first, response_ids=tuple(-token - 1 for token in first.response_ids)),
            replace(first, weight_version=first.weight_version + 1),
            replace(first, finish_reason="error"),
        ]
    )
    return rng.choice([[spoilt, *reply[1:]], reply[1:]])


class GarblingEngine(LocalEngine):
    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        reply = super().generate(requests, sampling)
        rng = random.Random()
        return garble(reply, rng) if rng.random() < 1 / 8 else reply


if __name__ == "__main__":
    run.engine_class = cluster.engine_class = lambda name: GarblingEngine
    sys.exit(cli.main())
