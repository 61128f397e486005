"""From hidden states to gradient: what the loss path sends, waits for and keeps, counted on real ranks.

The grid in `test_policy_grid.py` shows that the numbers are right. This file shows the cost: no host synchronization, the exact
collectives and their bytes, taking part without a single row, and the memory held for backward. The model is a table: a token's
hidden state is its embedding plus its position's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo  # imported once, before the ranks are forked
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo.batching.shard import PackedShard, build_shard
from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import HeadConfig, ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.loss_inputs import PolicyLoss
from megatron_fipo.objective.metrics import MAXIMA, SUMS
from megatron_fipo.trainer.rank_model import RankModel
from tests.distributed.tiny import make_trajectories, settings, write_model
from tests.objective.test_no_host_sync import NoHostCalls, NoHostKernels
from tests.ranks import run_ranks

HIDDEN, VOCABULARY, COLUMNS, POSITIONS = 8, 61, 64, 8192
SINGLE = ParallelConfig()
FIPO = ObjectiveConfig(half_life=8.0, influence_clip=(0.8, 1.2))
OBJECTIVES = {
    "fipo": FIPO,
    "fipo-reference-bonus": ObjectiveConfig(normalization="reference_micro_batch", entropy_coefficient=0.1),
    "dapo": ObjectiveConfig(name="dapo"),
    "grpo-bonus": ObjectiveConfig(name="grpo", entropy_coefficient=0.1),
    "fipo-tis": ObjectiveConfig(name="fipo", correction="tis"),
    "fipo-mis": ObjectiveConfig(name="fipo", correction="mis"),
}


def trajectory(prompt: int, response: int, seed: int = 0, mask: int = 1) -> Trajectory:
    rng = np.random.default_rng(seed)
    return Trajectory(
        group_id="g",
        prompt_ids=rng.integers(0, VOCABULARY, prompt).tolist(),
        response_ids=rng.integers(0, VOCABULARY, response).tolist(),
        response_mask=[mask] * response,
        rollout_log_probs=[0.0] * response,
        spans=[VersionSpan(0, 0, response)],
        finish_reason="stop",
        advantage=float(rng.normal()) + 0.1,
    )


def make_shard(
    trajectories: list[Trajectory], parallel: ParallelConfig, context_parallel_rank: int
) -> PackedShard:
    """Old log-probs are those of a uniform policy, so that log-ratios are far from zero."""
    shard = build_shard(
        trajectories,
        context_parallel_size=parallel.context_parallel_size,
        context_parallel_rank=context_parallel_rank,
        length_multiple=parallel.length_multiple,
        pad_token_id=0,
        max_position=POSITIONS,
    )
    return shard.with_old_log_probs(torch.full((shard.num_rows,), -np.log(VOCABULARY), dtype=torch.float32))


@dataclass
class Model:
    """A table of embeddings [VOCABULARY, H], a table of positions, and an output weight [columns, H] of padded vocabulary."""

    table: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def make(cls, columns: int = COLUMNS, scale: float = 0.3) -> "Model":
        generator = torch.Generator().manual_seed(1)
        table, positions, weight = (
            scale * torch.randn(n, HIDDEN, generator=generator) for n in (VOCABULARY, POSITIONS, columns)
        )
        return cls(table.requires_grad_(), positions, weight.requires_grad_())

    def hidden(self, shard: PackedShard) -> torch.Tensor:
        return (self.table[shard.input_ids[0]] + self.positions[shard.position_ids[0]]).unsqueeze(1)


def loss_path(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shard: PackedShard,
    objective: ObjectiveConfig,
    head: HeadConfig,
    tensor_group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocabulary: int = VOCABULARY,
) -> PolicyLoss:
    request = HeadRequest(
        shard.row_index, shard.labels, vocabulary, 0.9, head, objective.entropy_coefficient != 0
    )
    log_probs, entropy = response_log_probs(hidden, weight, request, tensor_group, sequence_parallel)
    return policy_loss(log_probs, entropy, shard.rows, objective, context_group)


class Collectives(TorchDispatchMode):
    """Records (kernel, bytes this rank puts in, dtype) of every torch.distributed call, whichever Python name it was made by."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            given = (
                args[1] if isinstance(args[0], torch.Tensor) else args[0][0]
            )  # all-reduce: a list of tensors
            self.calls.append((function.overloadpacket.__name__.strip("_"), given.nbytes, given.dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig(logits_memory_mb=1)], ids=["recompute", "keep"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_neither_forward_nor_backward_waits_for_the_device(name, head) -> None:
    model, shard = (
        Model.make(),
        make_shard([trajectory(3, 40), trajectory(2, 90, 1), trajectory(5, 4, 2, mask=0)], SINGLE, 0),
    )
    hidden = model.hidden(shard)
    with NoHostKernels(), NoHostCalls():
        result = loss_path(hidden, model.weight, shard, OBJECTIVES[name], head)
        result.statistics.merge(result.statistics).tensors()
        result.loss_sum.backward()
    assert model.table.grad is not None
    assert model.table.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_path_needs_no_values(name) -> None:
    """On the meta device tensors have shapes only: anything that looks at a number, or mixes devices, fails."""
    model, shard = Model.make(), make_shard([trajectory(3, 40), trajectory(2, 300, 1)], SINGLE, 0).to("meta")
    hidden = torch.empty(shard.input_ids.shape[1], 1, HIDDEN, device="meta", requires_grad=True)
    weight = model.weight.detach().to("meta").requires_grad_()
    loss_path(hidden, weight, shard, OBJECTIVES[name], HeadConfig(logits_memory_mb=1)).loss_sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


LAYOUTS = {
    "cp1": SINGLE,
    "cp2": ParallelConfig(context_parallel_size=2),
    "cp4": ParallelConfig(context_parallel_size=4),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "tp2-cp2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
    "tp2-sp-cp2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    ),
}


@dataclass
class RankResult:
    loss_sum: float
    normalizer: float
    table_gradient: torch.Tensor
    weight_gradient: torch.Tensor
    """Of this rank's slice of the vocabulary."""
    rows: int
    tokens: int
    calls: list[tuple[str, int, torch.dtype]]


def loss_on_rank(
    rank: int, world_size: int, parallel: ParallelConfig, batches: list[list[Trajectory]]
) -> list[RankResult]:
    """Loss and gradients of each micro-batch, watched for host synchronization and collectives from hidden states on."""
    model_parallel.initialize(parallel, seed=1)
    tensor_group, context_group = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
    )
    tensor_rank, tp = tensor_group.rank(), tensor_group.size()
    found = []
    for trajectories in batches:
        model = Model.make()
        shard = make_shard(trajectories, parallel, context_group.rank())
        complete = model.hidden(shard)
        hidden = (
            (complete.chunk(tp)[tensor_rank] if parallel.sequence_parallel else complete)
            .detach()
            .requires_grad_()
        )
        weight = model.weight.detach().chunk(tp)[tensor_rank].clone().requires_grad_()
        with NoHostKernels(), NoHostCalls(), Collectives() as collectives:
            result = loss_path(
                hidden,
                weight,
                shard,
                FIPO,
                HeadConfig(),
                tensor_group,
                context_group,
                parallel.sequence_parallel,
            )
            result.loss_sum.backward()
        assert hidden.grad is not None
        given = torch.zeros_like(complete)
        (given.chunk(tp)[tensor_rank] if parallel.sequence_parallel else given).copy_(hidden.grad)
        complete.backward(given)
        assert model.table.grad is not None
        assert weight.grad is not None
        sizes = (shard.num_rows, shard.input_ids.shape[1])
        totals = (result.loss_sum.item(), result.normalizer.item())
        found.append(RankResult(*totals, model.table.grad, weight.grad, *sizes, collectives.calls))
    return found


def expected_collectives(
    parallel: ParallelConfig, sequences: int, rows: int, tokens: int
) -> list[tuple[str, int, torch.dtype]]:
    """Forward, then backward: what the docstrings of head and scan promise, for float32 hidden states."""
    tp, single, double = parallel.tensor_model_parallel_size, torch.float32, torch.float64
    scan = [("allgather_base", 32 if parallel.context_parallel_size > 1 else 24, double)]
    scan = [(name, size * sequences, dtype) for name, size, dtype in scan]
    meet = [("allreduce", 4 * rows, single), ("allreduce", 12 * rows, single)] if rows else []
    if tp == 1:
        return scan
    if not parallel.sequence_parallel:
        return [*meet, *scan, ("allreduce", 4 * HIDDEN * rows, single)]
    gathered = 4 * HIDDEN * tokens
    return [
        ("allgather_base", gathered // tp, single),
        *meet,
        *scan,
        ("reduce_scatter_base", gathered, single),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_collectives_of_a_micro_batch_and_their_bytes(layout) -> None:
    """Three sequences, short and 128 times as long: the context-parallel all-gather is the same few bytes."""
    parallel = LAYOUTS[layout]
    batches = [
        [trajectory(3, length - 3), trajectory(5, 7, 1), trajectory(2, length // 2, 2)]
        for length in (32, 4096)
    ]
    for micro_batches in run_ranks(parallel.world_size, loss_on_rank, parallel, batches):
        for found in micro_batches:
            assert found.rows > 0
            assert found.calls == expected_collectives(parallel, 3, found.rows, found.tokens)
        scans = [
            [size for _, size, dtype in found.calls if dtype == torch.float64] for found in micro_batches
        ]
        assert scans[0] == scans[1]
        assert len(scans[0]) == 1
        assert scans[0][0] <= 64 * 3


UNEVEN = {
    "rows on one rank": [trajectory(40, 2)],
    "rows on every rank": [trajectory(40, 2), trajectory(1, 5, 1)],
    "no row anywhere": [trajectory(3, 20, mask=0)],
    "an empty micro-batch": [],
}


@pytest.mark.parametrize("layout", ["cp2", "cp4", "tp2-cp2", "tp2-sp-cp2"])
def test_ranks_without_rows_take_part_in_every_collective(layout) -> None:
    """Loss 0 and gradient 0 on them, no NaN, no hang; all ranks together give the gradient of the unsplit micro-batch."""
    parallel, batches = LAYOUTS[layout], list(UNEVEN.values())
    (expected,) = run_ranks(1, loss_on_rank, SINGLE, batches)
    ranks = run_ranks(parallel.world_size, loss_on_rank, parallel, batches)
    tp = parallel.tensor_model_parallel_size
    for case, name in enumerate(UNEVEN):
        found = [result[case] for result in ranks]
        busy = {"rows on one rank": tp, "rows on every rank": len(found)}.get(name, 0)
        idle = [result for result in found if result.rows == 0]
        assert len(idle) == len(found) - busy
        for result in idle:
            assert (result.loss_sum, result.normalizer) == (0.0, 0.0)
            assert result.table_gradient.abs().max() == 0
            assert result.weight_gradient.abs().max() == 0
        for result in found:
            assert result.calls == expected_collectives(
                parallel, max(1, len(batches[case])), result.rows, result.tokens
            )
        # Ranks are ordered tensor first. Without sequence parallelism every tensor-parallel rank holds the complete table gradient.
        summed = found if parallel.sequence_parallel else found[::tp]
        table = torch.stack([result.table_gradient for result in summed]).sum(0)
        weight = torch.cat([torch.stack([r.weight_gradient for r in found[t::tp]]).sum(0) for t in range(tp)])
        torch.testing.assert_close(table, expected[case].table_gradient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight, expected[case].weight_gradient, rtol=1e-5, atol=1e-6)
        assert sum(result.loss_sum for result in found[::tp]) == pytest.approx(
            expected[case].loss_sum, rel=1e-5
        )
        assert sum(result.normalizer for result in found[::tp]) == expected[case].normalizer


def mini_step_on_rank(
    rank: int, world_size: int, folder, parallel: ParallelConfig
) -> tuple[int, list[tuple]]:
    """A complete mini-step of the tiny model in float32: its float64 collectives are those of scan and statistics."""
    model_parallel.initialize(parallel, seed=1)
    policy = RankModel(**settings(folder, parallel), device=torch.device("cpu"))
    trajectories = make_trajectories(6)
    shards = [
        make_shard(trajectories[start : start + 2], parallel, parallel_state.get_context_parallel_rank())
        for start in (0, 2, 4)
    ]
    with Collectives() as collectives:
        policy.policy_step(shards, FIPO, lr=1e-3)
    return len(shards), [call for call in collectives.calls if call[2] == torch.float64]


@pytest.mark.parametrize("layout", ["cp2", "tp2-cp2"])
def test_a_mini_step_adds_two_all_reduces_for_all_statistics(layout, tmp_path) -> None:
    folder = write_model(tmp_path)
    for micro_batches, calls in run_ranks(
        LAYOUTS[layout].world_size, mini_step_on_rank, folder, LAYOUTS[layout]
    ):
        scans = [("allgather_base", 2 * 32, torch.float64)] * micro_batches
        assert calls == [
            *scans,
            ("allreduce", 8 * len(SUMS), torch.float64),
            ("allreduce", 8 * len(MAXIMA), torch.float64),
        ]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any kernel returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def saved_bytes(function: Callable[[], PolicyLoss], weight: torch.Tensor) -> tuple[PolicyLoss, int]:
    """Bytes of the distinct storages that are kept for backward, the weight's own left out."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(storages.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_as_large_as_the_logits_is_made_or_kept(name) -> None:
    """Per row the hidden state and some tens of floats stay; one slab's logits exist at a time; kept logits obey their budget."""
    columns, slab_bytes = 4096, 500 * 256 * 4
    model, shard = Model.make(columns), make_shard([trajectory(3, 200), trajectory(2, 300, 1)], SINGLE, 0)
    hidden, rows = model.hidden(shard).detach().requires_grad_(), shard.num_rows
    kept = {}
    for memory_mb in (0, 1, 2):
        head = HeadConfig(workspace_mb=1, logits_memory_mb=memory_mb)
        path = partial(loss_path, hidden, model.weight, shard, OBJECTIVES[name], head, vocabulary=columns)
        with LargestTensor() as largest:
            result, kept[memory_mb] = saved_bytes(path, model.weight)
            result.loss_sum.backward()
        assert 4 * largest.elements == slab_bytes <= 2**20 / 2
    assert kept[0] <= 4 * rows * (HIDDEN + 64)
    assert kept[0] < 4 * rows * columns / 50
    peaks = 4 * rows
    assert [kept[memory_mb] - kept[0] for memory_mb in (1, 2)] == [
        slabs * (slab_bytes + peaks) for slabs in (2, 4)
    ]
