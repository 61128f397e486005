"""One iteration of the 32B recipe at its full scale on this machine, with engines and ranks that compute nothing.

    python -m tools.bench.recipe_scale                 # 512 groups of 16 responses; needs 12 GB and a few minutes
    python -m tools.bench.recipe_scale --groups 64     # an eighth of it

512 x 16 responses of 9,500 tokens on average and at most 20,480, four of ten groups informative: 195 million sampled
and 78 million trained tokens. The engine pool, dispatch, collector, scorers (real processes with a tokenizer), planning,
the hand-over to ranks, shards, loop state and dump are those of a run; `recipe_parts.py` has the rest.

Seconds of the driver are CPU time of its thread, what an iteration cannot do in parallel; those of a rank are CPU time
of its process. The exponent is that of a power law through two runs, 16 times apart in the number of responses; 1 is
linear. The column "lists" is the same tokens as Python lists and tuples, pickled, as the driver held them before (at a
sixteenth, times 16).
"""

import base64
import contextlib
import json
import math
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.batching.iteration_batch import plan_iteration
from megatron_fipo.checkpoint.manifest import record_file
from megatron_fipo.config import Config, load_config
from megatron_fipo.driver.all_wrong import AllWrongWatch
from megatron_fipo.driver.cluster import ray_cluster, start_scorers
from megatron_fipo.driver.iteration_metrics import rollout_values
from megatron_fipo.driver.loop import set_advantages
from megatron_fipo.driver.rollout.collector import Collector
from megatron_fipo.driver.rollout.dump import write_dump
from megatron_fipo.driver.rollout.pool import EnginePool
from megatron_fipo.driver.rollout.trajectories import Overlong
from megatron_fipo.driver.scoring.pool import ScorerPool
from megatron_fipo.driver.tokenizer import checked_tokenizer
from megatron_fipo.driver.trainer_group import RLTrainer, TrainerGroup
from megatron_fipo.run_dir.loop_state import TOKENS_FILE, LoopState, write_loop_state
from megatron_fipo.tasks.dataset import Dataset
from megatron_fipo.tasks.response_text import ResponseText
from megatron_fipo.tasks.task import Problem
from tests.tiny_qwen2 import save_qwen2, save_tokenizer
from tools.bench.harness import heading, in_own_process, measurement, parser, table
from tools.bench.recipe_parts import (
    LIMIT,
    PROMPT,
    SYMBOLS,
    VOCABULARY,
    EmptyRank,
    PeakMemory,
    RandomEngine,
    private_bytes,
    response_lengths,
)

FULL = 512
"""Groups of an iteration of the recipe."""
ENGINES, RANKS, STORE_BYTES = 2, 2, 5 * 2**30
PROMPT_TOKENS = 150
WAITING_SHARE = 0.75
"""Groups in the saved state, as a share of an iteration's: 58 million tokens."""
DRIVER = "driver's private memory"
SERIAL = ("sample and score", "form the batch", "plan", "store the shares", "metrics")
"""Stages of the driver in every iteration."""
BEFORE = """For comparison, measured on 2026-11-28 at 1/20 of the scale and multiplied: the driver with lists of commit \
443b1ba needed 45 s of its own, 14 GiB for replies in flight, 6.0 GiB per rank at dp 1 (46 GiB per node), 7.1 s to read them on \
every rank, and 5 s to save 58M waiting tokens."""


class EmptyTrainer(RLTrainer):
    """`RLTrainer` with ranks that compute nothing."""

    def __init__(self, config: Config) -> None:
        TrainerGroup.__init__(self, lambda: EmptyRank, RANKS, 0, config=config)
        self.start()


class Stages:
    """Seconds of the driver by stage: CPU time of this thread, and wall time under `<stage>, wall`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.seconds[name] = time.thread_time() - cpu
        self.seconds[f"{name}, wall"] = time.perf_counter() - wall


def log(message: str) -> None:
    """Not to the standard output, which has the result."""
    print(message, file=sys.stderr)


def recipe(groups: int, data_parallel_size: int, model: Path) -> Config:
    return load_config(
        Path("examples/qwen2.5-32b/fipo.yaml"),
        [
            f"batch.prompts_per_iteration={groups}",
            f"batch.mini_batch_prompts={min(groups, 64)}",
            f"rollout.prompts_in_flight={groups * 10 // 4}",
            f"rollout.num_engines={ENGINES}",
            "parallel.context_parallel_size=4",
            "batch.max_tokens_per_micro_batch=11264",
            f"parallel.data_parallel_size={data_parallel_size}",
            f"model.path={model}",
            f"data.train_path={model}",
        ],
    )


def rehearse(groups: str, data_parallel_size: str) -> dict[str, float]:
    """One iteration; seconds by stage, bytes and counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_qwen2(folder, 0, hidden_size=32, intermediate_size=32, vocab_size=VOCABULARY)
        save_tokenizer(folder, SYMBOLS)
        config = recipe(int(groups), int(data_parallel_size), folder)
        with (
            ray_cluster(None, workers=ENGINES + RANKS, log=log, store_bytes=STORE_BYTES),
            contextlib.ExitStack() as stack,
        ):
            pool = EnginePool(
                RandomEngine,
                {},
                config.rollout,
                vocab_size=VOCABULARY,
                gpus_per_engine=0,
                keep_batches=False,
                loaded_weights_serve=True,
            )
            stack.callback(pool.shutdown)
            scorers = start_scorers(config, str(folder), (config.reward.name,), log)
            stack.callback(scorers.shutdown)
            trainer = EmptyTrainer(config)
            stack.callback(trainer.shutdown)
            pool.loaded(wait=True)
            with PeakMemory() as peak:
                seconds = iteration(config, folder, pool, scorers, trainer)
            return {**seconds, DRIVER: peak.bytes}


def iteration(
    config: Config, folder: Path, pool: EnginePool, scorers: ScorerPool, trainer: EmptyTrainer
) -> dict[str, float]:
    """The stages in their order. The sampling for the saved state comes last and is not part of an iteration."""
    stages, target = Stages(), config.batch.prompts_per_iteration
    collector = make_collector(config, target, folder, pool, scorers)
    with stages("sample and score"):
        collect(collector)
    with stages("form the batch"):
        collected = collector.pop_batch()
        set_advantages(collected.groups)
    with stages("plan"):
        batch = plan_iteration(collected.groups, config, pad_token_id=0)
    with stages("store the shares"):
        shares = trainer.store(batch)
    costs = trainer.train_iteration(shares, 0.0, []).costs
    del shares
    with stages("metrics"):
        rollout_values(collected, batch.trajectories, version=0)
    with stages("dump (dump_every)"):
        write_dump(folder / "dumps", 1, collected.groups, 1.0)
    lengths = [trajectory.response_length for trajectory in batch.trajectories]
    del collected, batch
    collector = make_collector(config, int(WAITING_SHARE * target), folder, pool, scorers)
    collect(collector)
    with stages("save the loop's state"):
        write_loop_state(folder, LoopState(1, 1, collector.state()))
        record_file(folder / TOKENS_FILE)
    return {
        **stages.seconds,
        "rank: read the share": max(cost.unpickle_s for cost in costs),
        "rank: build the shards": max(cost.shards_s for cost in costs),
        "rank: bytes": max(cost.host_bytes for cost in costs),
        "tokens": sum(lengths),
        "mean length": float(np.mean(lengths)),
        "saved bytes": (folder / TOKENS_FILE).stat().st_size,
    }


def make_collector(
    config: Config, target: int, folder: Path, pool: EnginePool, scorers: ScorerPool
) -> Collector:
    problems = [
        Problem(
            f"{index}", (index, *range(PROMPT, PROMPT + PROMPT_TOKENS)), f"prompt {index}", "7", "rehearsal"
        )
        for index in range(8_000)
    ]
    overlong = Overlong(LIMIT, config.reward.overlong_buffer, config.reward.overlong_factor)
    watch = AllWrongWatch(ResponseText(checked_tokenizer(str(folder), False)), log)
    return Collector(
        Dataset(problems, config.seed),
        pool,
        scorers,
        watch,
        config.rollout,
        overlong,
        target_groups=target,
        responses_per_prompt=config.batch.responses_per_prompt,
        seed=config.seed,
    )


def collect(collector: Collector) -> None:
    collector.resume(0)
    while not collector.enough:
        collector.step(0.2)
    collector.pause()


# -- the alternative ---------------------------------------------------------------------------------------


def lists(groups: str) -> dict[str, float]:
    """The same tokens as tuples and lists, pickled: seconds of the driver and of a rank."""
    seconds = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = call()
        seconds[name] = time.thread_time() - start
        return result

    with multiprocessing.Pool(1) as other:  # else its freed memory would hide what is allocated here
        stored = other.apply(pickled_replies, (int(groups),))
    before = private_bytes()
    replies = timed("sample and score", lambda: pickle.loads(stored))
    seconds[DRIVER] = private_bytes() - before
    batch = [(list(ids), [1] * len(ids), list(log_probs)) for ids, log_probs in replies]
    stored = timed("store the shares", lambda: pickle.dumps(batch))
    del batch
    before = private_bytes()
    batch = timed("rank: read the share", lambda: pickle.loads(stored))
    seconds["rank: bytes"] = private_bytes() - before
    timed("save the loop's state", lambda: json.dumps([_base64(ids, logs) for ids, _, logs in batch]))
    seconds["save the loop's state"] *= WAITING_SHARE
    return seconds


def pickled_replies(groups: int) -> bytes:
    rng = np.random.default_rng(0)
    return pickle.dumps(
        [
            (tuple(rng.integers(PROMPT, VOCABULARY, length).tolist()), tuple((-rng.random(length)).tolist()))
            for length in response_lengths(rng.standard_normal(groups * 16))
        ]
    )


def _base64(ids: list[int], log_probs: list[float]) -> list[str]:
    arrays = np.asarray(ids, "<i4"), np.asarray(log_probs, "<f8")
    return [base64.b64encode(array.tobytes()).decode() for array in arrays]


# -- the table ---------------------------------------------------------------------------------------------


def measure(kind: str, *arguments: str) -> dict[str, float]:
    return rehearse(*arguments) if kind == "arrays" else lists(*arguments)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--groups", type=int, default=FULL, help="groups of 16 responses")
    arguments.add_argument("--measure", nargs="+")
    options = arguments.parse_args()
    if measurement(measure, options.measure):
        return
    module, small = "tools.bench.recipe_scale", max(options.groups // 16, 2)
    full = in_own_process(module, "arrays", options.groups, 1)
    part = in_own_process(module, "arrays", small, 1)
    before = in_own_process(module, "lists", small)
    scale = options.groups / small
    names = [
        *SERIAL,
        "rank: read the share",
        "rank: build the shards",
        "save the loop's state",
        "dump (dump_every)",
    ]
    print(
        heading(
            f"{options.groups} x 16 responses, mean {full['mean length']:,.0f}, {full['tokens'] / 1e6:.0f}M trained tokens"
        )
    )
    print(
        "seconds: CPU time; exponent: against a sixteenth of the responses; lists: CPU seconds with Python lists"
    )
    print(
        table(
            ["stage", "seconds", "wall", "exponent", "lists"],
            [row(n, full, part, before, scale) for n in names],
        )
    )
    serial, saved = sum(full[name] for name in SERIAL), full["saved bytes"] / 8e6
    print(f"the driver's own work: {serial:.1f} s; waiting tokens in the saved state: {saved:.0f}M")
    print(
        f"driver, private memory: {full[DRIVER] / 2**30:.2f} GiB (lists: {before[DRIVER] * scale / 2**30:.1f} GiB of replies)"
    )
    ranks = {1: full, **{dp: in_own_process(module, "arrays", options.groups, dp) for dp in (2, 4)}}
    memory = ", ".join(f"{values['rank: bytes'] / 2**30:.2f} GiB at dp {dp}" for dp, values in ranks.items())
    print(
        f"rank, private memory: {memory} (lists: {before['rank: bytes'] * scale / 2**30:.1f} GiB at any dp)"
    )
    if options.groups == FULL:
        print(BEFORE)


def row(
    name: str, full: dict[str, float], part: dict[str, float], before: dict[str, float], scale: float
) -> list[str]:
    exponent = math.log(max(full[name], 1e-3) / max(part[name], 1e-3)) / math.log(scale)
    wall = full.get(f"{name}, wall")
    old = f"{before[name] * scale:.1f}" if name in before else ""
    return [name, f"{full[name]:.2f}", "" if wall is None else f"{wall:.1f}", f"{exponent:.2f}", old]


if __name__ == "__main__":
    main()
