"""Attention, a training step and the absence of host synchronization, on the device."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.checkpoint.shard_layouts import map_model
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings
from megatron_fipo.model import mcore
from megatron_fipo.model.attention import PackedAttention
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from megatron_fipo.model.swiglu import SwiGLU
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.trainer.rank_model import RankModel, StepResult
from tests.gpu.compare import relative_norm, require
from tests.gpu.loss_inputs import FIPO
from tests.gpu.policies import (
    Shape,
    deterministic,
    new_policy,
    one_rank,
    random_shard,
    score,
    with_old_log_probs,
)
from tools.bench.harness import Bench, synchronize

pytestmark = pytest.mark.gpu


def _shape(bench: Bench) -> Shape:
    return bench.pick(
        Shape(4, 512, 1_024, 8, 2, 4_099, False), Shape(2, 32, 48, 4, 2, 61, False, positions=256)
    )


def _shard(bench: Bench) -> PackedShard:
    prompts, responses = bench.pick(([30, 5, 200, 64], [700, 90, 1_500, 3]), ([3, 2, 5], [30, 9, 1]))
    return random_shard(bench, _shape(bench), prompts, responses, seed=1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 5e-5)], ids=["bfloat16", "float32"]
)
def test_packed_attention(
    bench: Bench, record_errors: Callable, dtype: torch.dtype, tolerance: float
) -> None:
    """`PackedAttention` forward and backward, sequence by sequence against float64."""
    lengths = bench.pick([700, 1, 64, 2_000, 65], [20, 1, 7])
    heads, groups, size = bench.pick((8, 2, 64), (4, 2, 8))
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(sum(lengths), n, size, generator=generator).to(bench.device, dtype).requires_grad_()
        for n in (heads, groups, groups)
    )
    direction = torch.randn(sum(lengths), heads * size, generator=generator).to(bench.device)
    with one_rank(bench, seed=1):
        out = _packed_attention(bench, query, key, value, lengths)
        found = torch.autograd.grad((out.float() * direction).sum(), [query, key, value])
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    parts = zip(*(tensor.split(lengths) for tensor in exact), strict=True)
    truth = torch.cat([_dense_attention(*part) for part in parts])
    expected = torch.autograd.grad((truth * direction.double()).sum(), exact)
    errors = {"out": relative_norm(out, truth)}
    errors |= {
        name: relative_norm(a, b) for name, a, b in zip(("dQ", "dK", "dV"), found, expected, strict=True)
    }
    record_errors(errors, dict.fromkeys(errors, tolerance))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)], ids=["bfloat16", "float32"]
)
def test_swiglu(bench: Bench, record_errors: Callable, dtype: torch.dtype, tolerance: float) -> None:
    """`SwiGLU` forward and backward against float64."""
    tokens, width = bench.pick((3_000, 8_960), (20, 48))
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(tokens, 1, 2 * width, generator=generator).mul_(3)
    given = given.to(bench.device, dtype).requires_grad_()
    incoming = torch.randn(tokens, 1, width, generator=generator).to(bench.device, dtype)
    found = SwiGLU("triton")(given)
    (gradient,) = torch.autograd.grad(found, given, incoming)
    exact = given.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    (expected,) = torch.autograd.grad(truth, exact, incoming.double())
    errors = {"out": relative_norm(found, truth), "gradient": relative_norm(gradient, expected)}
    record_errors(errors, dict.fromkeys(errors, tolerance))


def _packed_attention(bench: Bench, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """The module under test, on [T, heads, d] and [T, groups, d] twice."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=query.shape[1] * query.shape[2],
        num_attention_heads=query.shape[1],
        num_query_groups=key.shape[1],
    )
    cu_seqlens = torch.tensor([0, *lengths], device=bench.device).cumsum(0).int()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return PackedAttention(config, 1, None, "self")(query, key, value, None, packed_seq_params=packed)


def _dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L, heads, d], [L, groups, d] twice → [L, heads · d], written out."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value).flatten(1)


@pytest.mark.parametrize(
    "objective",
    [FIPO, replace(FIPO, entropy_coefficient=0.01, correction="tis")],
    ids=["fipo", "bonus and tis"],
)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_no_host_sync(bench: Bench, kernels: str, objective: ObjectiveConfig) -> None:
    """From hidden states to their gradient the host never waits for the device."""
    shape, shard = _shape(bench), _shard(bench)
    generator = torch.Generator().manual_seed(9)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*sizes, generator=generator).mul_(scale)
        return drawn.bfloat16().to(bench.device).requires_grad_()

    hidden = normal(shard.input_ids.shape[1], 1, shape.hidden)
    weight = normal(shape.vocabulary, shape.hidden, scale=0.05)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    shard = shard.with_old_log_probs(torch.full((shard.num_rows,), -8.0, device=bench.device))

    def loss_path() -> None:
        bonus, head = objective.entropy_coefficient != 0, HeadConfig(kernels=kernels)
        request = HeadRequest(shard.row_index, shard.labels, shape.vocabulary, 1.0, head, bonus)
        log_probs, entropy = response_log_probs(hidden, weight, request, None, False)
        loss = policy_loss(log_probs, entropy, shard.rows, objective, None, kernels=kernels)
        torch.autograd.grad(loss.loss_sum, [hidden, weight])

    loss_path()  # compiles
    synchronize(bench)
    with _no_sync(bench):
        loss_path()


@contextmanager
def _no_sync(bench: Bench) -> Iterator[None]:
    """A wait for the device raises RuntimeError; a CPU has no such waits."""
    if not bench.on_gpu:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Trained:
    results: list[StepResult]
    old_log_probs: list[Tensor]
    weights: dict[str, Tensor]


def _train(bench: Bench, dtype: str, steps: int, old_log_probs: list[Tensor] | None = None) -> Trained:
    """Steps of a fresh policy, whose weights are the same in every dtype; without old log-probs it scores them itself.

    Weights have the names in the family's table.
    """
    with one_rank(bench, seed=5):
        model = ModelConfig(dtype=dtype, layer_spec="portable" if dtype == "float32" else "auto")
        policy = new_policy(bench, _shape(bench), model, optimizer=OptimizerSettings(clip_grad=0.0))
        _set_weights(policy)
        shards = [_shard(bench), _shard(bench)]
        old = score(policy, shards, drift=0.05, seed=6) if old_log_probs is None else old_log_probs
        shards = with_old_log_probs(shards, old)
        results = [policy.policy_step(shards, FIPO, lr=1e-3) for _ in range(steps)]
        return Trained(
            results,
            old,
            {name: value.detach().clone() for name, value in map_model(policy.modules).parameters.items()},
        )


@torch.no_grad()
def _set_weights(policy: RankModel) -> None:
    """Normal numbers on bfloat16's grid, drawn on the CPU by name: the same in every dtype and with every kind of layer."""
    for name, parameter in map_model(policy.modules).parameters.items():
        drawn = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )
        scale = 1.0 / parameter.shape[-1] ** 0.5
        parameter.copy_((0.1 * drawn + 1 if "norm" in name else scale * drawn).bfloat16())
    policy.optimizer.reload_model_params()


def test_a_step_in_bf16_is_near_one_in_fp32(bench: Bench, record_errors: Callable) -> None:
    """Loss and gradient norm."""
    exact = _train(bench, "float32", 1)
    rounded = _train(bench, "bfloat16", 1, exact.old_log_probs)
    (found,), (expected,) = rounded.results, exact.results
    require(not found.skipped, f"the step was skipped, gradient norm {found.grad_norm}")
    loss, true_loss = (result.statistics["policy/loss"] for result in (found, expected))
    errors = {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradient norm": abs(found.grad_norm - expected.grad_norm) / expected.grad_norm,
    }
    record_errors(errors, {"loss": 0.1, "gradient norm": 0.1})


@pytest.mark.skipif(mcore.VERSION < (0, 19), reason="HybridModel came with Megatron-Core 0.19")
def test_a_step_of_hybrid_model_is_that_of_gpt_model(
    bench: Bench, record_errors: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradient norm and the updated weights, in bfloat16 (with Transformer Engine's layers if it is installed)."""
    expected = _train(bench, "bfloat16", 1)
    monkeypatch.setattr(mcore, "USES_HYBRID_MODEL", True)
    found = _train(bench, "bfloat16", 1, expected.old_log_probs)
    require(found.weights.keys() == expected.weights.keys(), "the weights have other names")
    (result,), (true_result,) = found.results, expected.results
    loss, true_loss = (step.statistics["policy/loss"] for step in (result, true_result))
    errors = {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradient norm": abs(result.grad_norm - true_result.grad_norm) / true_result.grad_norm,
        "weights": max(relative_norm(found.weights[name], expected.weights[name]) for name in found.weights),
    }
    record_errors(errors, {"loss": 1e-3, "gradient norm": 1e-3, "weights": 1e-3})


def test_deterministic_runs_have_the_same_bits(bench: Bench) -> None:
    """Two runs of two steps give the same statistics and weights."""
    with deterministic():
        first, second = (_train(bench, "bfloat16", 2) for _ in range(2))
    same = first.results[1].statistics == second.results[1].statistics
    require(same, "the statistics of the second step differ")
    moved = [name for name, value in first.weights.items() if not torch.equal(value, second.weights[name])]
    require(not moved, f"{len(moved)} of {len(first.weights)} weights differ, such as {moved[:1]}")
