"""Attention, a whole training step and the absence of host synchronisation, on the device."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gpu.compare import Errors, one_row, relative_norm, require, within
from gpu.measure import Bench, synchronize
from gpu.policies import Shape, new_policy, one_rank, random_shard, score, with_old_log_probs
from gpu.report import Row
from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings
from megatron_fipo.model.attention import PackedAttention
from megatron_fipo.model.layer_spec import SHARED_NAMES
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.trainer.rank import be_deterministic
from megatron_fipo.trainer.rank_model import RankModel, StepResult

os.environ["CUBLAS_WORKSPACE_CONFIG"] = (
    ":4096:8"  # before the first product, or deterministic mode comes too late
)

SECTION = "model"
FIPO = ObjectiveConfig(influence_clip=(0.8, 1.2))


def _shape(bench: Bench) -> Shape:
    return bench.pick(
        Shape(4, 512, 1_024, 8, 2, 4_099, False), Shape(2, 32, 48, 4, 2, 61, False, positions=256)
    )


def _shard(bench: Bench) -> PackedShard:
    prompts, responses = bench.pick(([30, 5, 200, 64], [700, 90, 1_500, 3]), ([3, 2, 5], [30, 9, 1]))
    return random_shard(bench, _shape(bench), prompts, responses, seed=1)


def attention(bench: Bench) -> Iterator[Row]:
    """`PackedAttention` forward and backward, sequence by sequence against float64."""
    lengths = bench.pick([700, 1, 64, 2_000, 65], [20, 1, 7])
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 5e-5)):
        with one_rank(bench, seed=1):
            name = str(dtype).removeprefix("torch.")
            yield one_row(
                SECTION,
                f"attention, {name}",
                {"forward and backward": partial(_check_attention, bench, lengths, dtype, tolerance)},
            )


def _check_attention(bench: Bench, lengths: list[int], dtype: torch.dtype, tolerance: float) -> Errors:
    heads, groups, size = bench.pick((8, 2, 64), (4, 2, 8))
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups
    )
    core = PackedAttention(config, 1, None, "self")
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(sum(lengths), n, size, generator=generator).to(bench.device, dtype).requires_grad_()
        for n in (heads, groups, groups)
    )
    direction = torch.randn(sum(lengths), heads * size, generator=generator).to(bench.device)
    cu_seqlens = torch.tensor([0, *lengths], device=bench.device).cumsum(0).int()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    out = core(query, key, value, None, packed_seq_params=packed)
    found = torch.autograd.grad((out.float() * direction).sum(), [query, key, value])
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    truth = torch.cat(
        [_dense_attention(*parts) for parts in zip(*(tensor.split(lengths) for tensor in exact), strict=True)]
    )
    expected = torch.autograd.grad((truth * direction.double()).sum(), exact)
    errors = {"out": relative_norm(out, truth)}
    errors |= {
        name: relative_norm(a, b) for name, a, b in zip(("dQ", "dK", "dV"), found, expected, strict=True)
    }
    return within(errors, dict.fromkeys(errors, tolerance))


def _dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L, heads, d], [L, groups, d] twice → [L, heads · d], written out."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value).flatten(1)


@dataclass(frozen=True)
class Trained:
    results: list[StepResult]
    old_log_probs: list[Tensor]
    weights: dict[str, Tensor]


def _train(bench: Bench, dtype: str, steps: int, old_log_probs: list[Tensor] | None = None) -> Trained:
    """Steps of a fresh policy, whose weights are the same in every dtype; without old log-probs it scores them itself."""
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
            {name: value.detach().clone() for name, value in policy.modules[0].named_parameters()},
        )


@torch.no_grad()
def _set_weights(policy: RankModel) -> None:
    """Normal numbers on bfloat16's grid, drawn on the CPU by name: the same in every dtype and with every kind of layer."""
    for name, parameter in policy.modules[0].named_parameters():
        for portable, shared in SHARED_NAMES.items():
            name = name.replace(portable, shared)
        drawn = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )
        scale = 1.0 / parameter.shape[-1] ** 0.5
        parameter.copy_((0.1 * drawn + 1 if "norm" in name else scale * drawn).bfloat16())
    policy.optimizer.reload_model_params()


def bf16_step(bench: Bench) -> Iterator[Row]:
    """Loss and gradient norm of a step in bfloat16 near those in float32."""

    def check() -> Errors:
        exact = _train(bench, "float32", 1)
        rounded = _train(bench, "bfloat16", 1, exact.old_log_probs)
        (found,), (expected,) = rounded.results, exact.results
        require(not found.skipped, f"the step was skipped, gradient norm {found.grad_norm}")
        loss, true_loss = (result.statistics["policy/loss"] for result in (found, expected))
        errors = {
            "loss": abs(loss - true_loss) / abs(true_loss),
            "gradient norm": abs(found.grad_norm - expected.grad_norm) / expected.grad_norm,
        }
        return within(errors, {"loss": 0.1, "gradient norm": 0.1})

    yield one_row(SECTION, "bf16 step near fp32 step", {"one step": check})


def repeated_step(bench: Bench) -> Iterator[Row]:
    """With `deterministic` two runs of two steps give the same weights, bit for bit."""

    def check() -> Errors:
        with _deterministic():
            first, second = (_train(bench, "bfloat16", 2) for _ in range(2))
        require(
            first.results[1].statistics == second.results[1].statistics,
            "the statistics of the second step differ",
        )
        moved = [
            name for name, value in first.weights.items() if not torch.equal(value, second.weights[name])
        ]
        require(not moved, f"{len(moved)} of {len(first.weights)} weights differ, such as {moved[:1]}")
        return {"differing weights": 0.0}

    yield one_row(SECTION, "deterministic: same bits", {"two runs": check})


@contextmanager
def _deterministic() -> Iterator[None]:
    be_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def no_host_sync(bench: Bench) -> Iterator[Row]:
    """From hidden states to their gradient the host never waits for the device."""
    shape = _shape(bench)
    shard = _shard(bench)
    tokens = shard.input_ids.shape[1]
    generator = torch.Generator().manual_seed(9)
    hidden = (
        torch.randn(tokens, 1, shape.hidden, generator=generator).bfloat16().to(bench.device).requires_grad_()
    )
    weight = (
        torch.randn(shape.vocabulary, shape.hidden, generator=generator)
        .mul_(0.05)
        .bfloat16()
        .to(bench.device)
        .requires_grad_()
    )
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    shard = shard.with_old_log_probs(torch.full((shard.num_rows,), -8.0, device=bench.device))

    def loss_path(kernels: str, objective: ObjectiveConfig) -> None:
        bonus = objective.entropy_coefficient != 0
        head = HeadConfig(kernels=kernels)
        request = HeadRequest(shard.row_index, shard.labels, shape.vocabulary, 1.0, head, bonus)
        log_probs, entropy = response_log_probs(hidden, weight, request, None, False)
        loss = policy_loss(log_probs, entropy, shard.rows, objective, None, kernels=kernels)
        torch.autograd.grad(loss.loss_sum, [hidden, weight])

    def check(kernels: str, objective: ObjectiveConfig) -> Errors:
        loss_path(kernels, objective)  # compiles
        synchronize(bench)
        with _no_sync(bench):
            loss_path(kernels, objective)
        return {"waits": 0.0}

    bonus = replace(FIPO, entropy_coefficient=0.01, correction="tis")
    for kernels in ("triton", "torch"):
        checks = {
            name: partial(check, kernels, objective)
            for name, objective in (("fipo", FIPO), ("bonus and tis", bonus))
        }
        yield one_row(SECTION, f"no host sync (aim), {kernels}", checks)


@contextmanager
def _no_sync(bench: Bench) -> Iterator[None]:
    """A wait for the device raises; on a CPU there is nothing to wait for."""
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


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "attention": attention,
    "no host sync": no_host_sync,
    "bf16 step": bf16_step,
    "deterministic step": repeated_step,
}
