"""What a training step of the portable layers allocates on each rank, measured with torch's profiler, and the case of it.

torch reports every allocation and release of its CPU allocator to the profiler. Their running sum has its peak where an
allocator of a GPU has it, and is the same in every run.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.batching.shard import PackedShard, build_shard
from megatron_fipo.config import (
    BatchConfig,
    Config,
    HeadConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    RolloutConfig,
)
from megatron_fipo.families.family import Experts
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.model import parallel as process_groups
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.workload import Assumptions
from megatron_fipo.trainer.rank_model import RankModel
from tests.gpu.policies import Shape, random_trajectories
from tests.plan.cases import expert_keys
from tests.plan.machines import cpu_machine
from tests.ranks import run_ranks

SEQUENCES = 4
"""In each micro-batch, of equal length, a quarter of it prompt."""

SHAPE = Shape(layers=4, hidden=128, ffn=640, heads=8, groups=4, vocabulary=512, tied=True)
STEPS = 3
"""Steps of which the smallest peak counts: gloo's threads release the tensors of a collective some time after it."""


@dataclass(frozen=True)
class Run:
    """A layout, a model and a micro-batch in float32."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: str = "none"
    tied: bool = True
    head_norms: bool = False
    """Qwen3 instead of Qwen2."""
    experts: Experts | None = None
    """Qwen3-MoE instead of Qwen2; tokens are routed to all experts equally often."""
    shape: Shape = SHAPE
    tokens: int = 1024
    """Of a micro-batch on one rank, before sequence parallelism."""
    micro_batches: int = 1
    """Of each data-parallel rank."""
    head: HeadConfig = field(default_factory=lambda: HeadConfig(workspace_mb=1))
    distributed: bool = True

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.tokens * self.parallel.context_parallel_size // SEQUENCES


def case_of(run: Run, folder: Path) -> Case:
    """The planner's case of a run; writes the model's config.json to `folder`."""
    values = replace(run.shape, tied=run.tied).hf_config() | _family(run)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    sequences = SEQUENCES * run.micro_batches * run.parallel.data_parallel_size
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32", recompute=run.recompute),
        parallel=run.parallel,
        head=run.head,
        optimizer=OptimizerSettings(distributed=run.distributed),
        batch=BatchConfig(
            prompts_per_iteration=sequences // 2,
            mini_batch_prompts=sequences // 2,
            responses_per_prompt=2,
            max_tokens_per_micro_batch=run.tokens,
        ),
        rollout=RolloutConfig(placement="separate"),
    )
    prompt = run.length // 4
    assumptions = Assumptions(
        prompt_tokens=prompt,
        response_end=run.length - prompt,
        prompt_spread=0,
        response_spread=0,
        expert_load=1,
    )
    return Case(config, *read_model_config(folder), cpu_machine(), assumptions)


def _family(run: Run) -> dict[str, Any]:
    """The keys of config.json that differ from Qwen2's."""
    if run.experts is not None:
        return expert_keys(run.experts, run.shape.head_size)
    if run.head_norms:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": run.shape.head_size,
        }
    return {}


@dataclass(frozen=True)
class Measured:
    """One rank."""

    stage: int
    peak: int
    """Bytes of an optimizer step at its peak, beyond what existed before it."""
    packs: int
    """Bytes of its shards."""
    parameters: int
    gradients: int
    optimizer: int
    """Bytes of state."""


def measure(run: Run, folder: Path) -> list[Measured]:
    """Every rank of a run, by rank."""
    case = case_of(run, folder)
    return run_ranks(run.parallel.world_size, _measure_rank, case.config, run)


def _measure_rank(rank: int, world_size: int, config: Config, run: Run) -> Measured:
    torch.set_num_threads(1)
    process_groups.initialize(config.parallel, seed=1)
    policy = RankModel(config.model, config.parallel, config.head, config.optimizer, 1.0, torch.device("cpu"))
    shards = [_shard(run, seed) for seed in range(run.micro_batches)]
    routes = [_even_routes(policy, run) for _ in shards]
    policy.policy_step(shards, config.objective, 1e-6, routes)  # makes the optimizer's state
    peaks = []
    for _ in range(STEPS):
        parallel_state.get_global_memory_buffer().buffer.clear()  # so that it counts
        _forget_micro_batches(policy)
        gc.collect()
        with _waiting(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            policy.policy_step(shards, config.objective, 1e-6, routes)
        peaks.append(peak(recorded))
    parameters = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    optimizers = policy.optimizer.chained_optimizers if run.experts else [policy.optimizer]
    states = [
        tensor for each in optimizers for state in each.optimizer.state.values() for tensor in state.values()
    ]
    return Measured(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        peak=min(peaks),
        packs=sum(_nbytes(shard) for shard in shards),
        parameters=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.main_grad.nbytes for parameter in parameters if parameter.requires_grad),
        optimizer=sum(tensor.nbytes for tensor in states if isinstance(tensor, torch.Tensor) and tensor.ndim),
    )


def _forget_micro_batches(policy: RankModel) -> None:
    """Drop what the dispatchers keep of the last micro-batch, so that it counts."""
    for layer in (module for chunk in policy.modules for module in chunk.modules()):
        if isinstance(layer, MoELayer):
            dispatcher = layer.token_dispatcher
            dispatcher.probs = dispatcher.routing_map = None
            dispatcher.reversed_local_input_permutation_mapping = None


@contextmanager
def _waiting() -> Iterator[None]:
    """A pause after each all-to-all, in which gloo's threads release its tensors."""
    exchange = torch.distributed.all_to_all_single

    def exchange_and_wait(*args: Any, **kwargs: Any) -> Any:
        work = exchange(*args, **kwargs)
        time.sleep(0.005)
        return work

    torch.distributed.all_to_all_single = exchange_and_wait
    try:
        yield
    finally:
        torch.distributed.all_to_all_single = exchange


def _even_routes(policy: RankModel, run: Run) -> list[list[torch.Tensor]] | None:
    """Routes of a micro-batch, by model chunk and layer: the tokens take the experts in turn."""
    if run.experts is None:
        return None
    tokens = run.tokens // (run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1)
    chosen = torch.arange(tokens * run.experts.per_token) % run.experts.count
    route = chosen.view(tokens, run.experts.per_token).to(torch.uint8)
    return [[route for _ in chunk.layers] for chunk in policy.routing]


def _shard(run: Run, seed: int) -> PackedShard:
    prompt = run.length // 4
    trajectories = random_trajectories(
        run.shape, [prompt] * SEQUENCES, [run.length - prompt] * SEQUENCES, seed
    )
    return build_shard(
        trajectories,
        context_parallel_size=run.parallel.context_parallel_size,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        length_multiple=run.parallel.length_multiple,
        pack_multiple=run.parallel.pack_multiple(1),
        pad_token_id=0,
        max_position=run.shape.positions,
    )


def _nbytes(value: object) -> int:
    """Bytes of all tensors in a dataclass of tensors, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(_nbytes, value))
    return sum(map(_nbytes, vars(value).values())) if is_dataclass(value) else 0


def peak(recorded: profile) -> int:
    """The largest running sum of allocations and releases."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    return max(accumulate(size for _, size in changes))
