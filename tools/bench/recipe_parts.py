"""What the rehearsal of `recipe_scale.py` puts in the place of computing: engines and ranks that compute nothing.

They exchange with the driver exactly what real ones do. An engine answers at once with random tokens whose
number follows the recipe's law of lengths. A rank reads its share and builds every shard twice, for old log-probs
and for the update.
"""

import random
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_fipo.config import Config
from megatron_fipo.engine.protocol import EngineStatus, Generation, GenerationRequest, SamplingParams
from megatron_fipo.trainer.protocol import IterationReport, RankCosts, RankIteration, RLRank
from tools.bench.harness import resident

if TYPE_CHECKING:
    import ray

    from megatron_fipo.batching.rank_share import RankShare

SHORTEST, LIMIT = 8, 20_480
MEDIAN_LENGTH, LENGTH_SPREAD = 8_400, 0.6
"""Log-normal, cut at `LIMIT`: the mean is about 9,500 tokens."""
INFORMATIVE = 0.4
"""Share of prompts with right and wrong responses."""
PAD, END, RIGHT, WRONG, PROMPT = range(5)
"""Token ids with a meaning; all others are words."""
VOCABULARY = 12_288
SYMBOLS = [
    "<pad>",
    "<eos>",
    "ĊAnswer:Ġ7",
    "ĊAnswer:Ġ8",
    "q",
    *(f"Ġ{token:04x}" for token in range(5, VOCABULARY)),
]


class RandomEngine:
    """A `RolloutEngine` of random tokens. Calls are as large and as many as vLLM's."""

    requests_per_call: ClassVar[int] = 16
    calls_at_once: ClassVar[int] = 64

    def __init__(self) -> None:
        self._tokens = 0

    def ready(self) -> EngineStatus:
        return self.status()

    def status(self) -> EngineStatus:
        return EngineStatus(0, self._tokens)

    def generate(self, requests: list[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        answers = [self._answer(request) for request in requests]
        self._tokens += sum(len(answer.response_ids) for answer in answers)
        return answers

    def abort(self) -> None: ...

    def _answer(self, request: GenerationRequest) -> Generation:
        rng = np.random.default_rng(request.seed)
        (length,) = response_lengths(rng.standard_normal(1)).tolist()
        tokens = rng.integers(PROMPT, VOCABULARY, length, dtype=np.int32)
        informative = random.Random(request.prompt_ids[0]).random() < INFORMATIVE
        tokens[-2:] = (RIGHT if informative and rng.random() < 0.5 else WRONG), END
        log_probs = rng.random(length, dtype=np.float32) * np.float32(-2)
        return Generation(tokens, log_probs, "stop" if length < LIMIT else "length", 0)


class PeakMemory:
    """The most private memory of this process in a `with` block, from a thread: `bytes`. Pages of Ray's store are shared."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, private_bytes())


def private_bytes() -> int:
    """Resident memory of this process that no file and no other process shares."""
    return resident("RssAnon")


def response_lengths(normal: np.ndarray) -> np.ndarray:
    """Numbers of response tokens from standard normal numbers, int64."""
    return np.clip(MEDIAN_LENGTH * np.exp(LENGTH_SPREAD * normal), SHORTEST, LIMIT).astype(np.int64)


class EmptyRank(RLRank):
    """A rank without a model, in place `rank` of a context-parallel group of the recipe's size."""

    def __init__(self, rank: int, world_size: int, config: Config) -> None:
        import megatron_fipo.batching.shard  # noqa: F401 (torch, as on a real rank)

        self.rank = rank
        self.config = config

    def rendezvous(self) -> str:
        return ""

    def setup(self, rendezvous: str) -> None: ...

    def describe(self) -> list[str]:
        return []

    def train_iteration(
        self, shares: "Sequence[ray.ObjectRef[RankShare]]", lr: float, samples: list[int]
    ) -> RankIteration:
        """The costs are private memory beyond that before, and seconds in which shards are built, not waited for."""
        import ray

        from megatron_fipo.batching.shard import PackedShard, build_shard
        from megatron_fipo.trainer.one_ahead import one_ahead

        parallel = self.config.parallel
        before = private_bytes()
        with PeakMemory() as peak:
            start = time.process_time()
            share = ray.get(shares[0])
            read = time.process_time()

            def make(step: int) -> list[PackedShard]:
                return [
                    build_shard(
                        trajectories,
                        context_parallel_size=parallel.context_parallel_size,
                        context_parallel_rank=self.rank,
                        length_multiple=parallel.length_multiple,
                        pad_token_id=share.pad_token_id,
                        max_position=2 * LIMIT,
                    )
                    for trajectories in share.micro_batches(step)
                ]

            for _ in ("old log-probs", "update"):
                one_ahead(make, lambda step, shards: None, len(share.mini_batches))
        costs = RankCosts(read - start, time.process_time() - read, peak.bytes - before)
        return RankIteration(IterationReport([], {}) if self.rank == 0 else None, [], costs)
