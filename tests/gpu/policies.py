"""Complete policies on one rank, without files or downloads: a config.json written here, random weights and trajectories."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.batching.shard import PackedShard, build_shard
from megatron_fipo.batching.trajectory import Trajectory, VersionSpan
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.trainer.rank import be_deterministic
from megatron_fipo.trainer.rank_model import RankModel
from tools.bench.harness import Bench, release


@dataclass(frozen=True)
class Shape:
    """A Qwen2-shaped model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    positions: int = 32_768

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def hf_config(self) -> dict:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "initializer_range": 0.02,
        }


@contextmanager
def one_rank(bench: Bench, seed: int) -> Iterator[None]:
    """A world of one rank, and Megatron-Core's groups in it, while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if bench.on_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model_parallel.initialize(ParallelConfig(), seed)
            yield
        finally:
            model_parallel.destroy()
            dist.destroy_process_group()
            release(bench)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch and its libraries choose deterministic algorithms until the block ends."""
    before = dict(os.environ)
    be_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def new_policy(
    bench: Bench,
    shape: Shape,
    model: ModelConfig,
    head: HeadConfig | None = None,
    optimizer: OptimizerSettings | None = None,
) -> RankModel:
    """A policy with random weights; `model.path` is filled in. Needs `one_rank`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.hf_config()), encoding="utf-8")
        model.path = folder
        return RankModel(
            model, ParallelConfig(), head or HeadConfig(), optimizer or OptimizerSettings(), 1.0, bench.device
        )


def random_trajectories(
    shape: Shape, prompts: Sequence[int], responses: Sequence[int], seed: int
) -> list[Trajectory]:
    """Sequences with these lengths."""
    random = np.random.default_rng(seed)
    return [
        Trajectory(
            group_id=str(index),
            prompt_ids=random.integers(0, shape.vocabulary, prompt).tolist(),
            response_ids=random.integers(0, shape.vocabulary, response).tolist(),
            response_mask=[1] * response,
            rollout_log_probs=[-1.0] * response,
            spans=[VersionSpan(0, 0, response)],
            finish_reason="stop",
            advantage=float(random.normal(0.5, 1.0)),
        )
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def random_shard(
    bench: Bench, shape: Shape, prompts: Sequence[int], responses: Sequence[int], seed: int, multiple: int = 1
) -> PackedShard:
    """One micro-batch of sequences with these lengths, on the device; `old_log_probs` are still zeros."""
    return pack(bench, shape, random_trajectories(shape, prompts, responses, seed), multiple)


def pack(bench: Bench, shape: Shape, trajectories: Sequence[Trajectory], multiple: int = 1) -> PackedShard:
    """One micro-batch, on the device."""
    shard = build_shard(
        list(trajectories),
        context_parallel_size=1,
        context_parallel_rank=0,
        length_multiple=1,
        pad_token_id=0,
        max_position=shape.positions,
        pack_multiple=multiple,
    )
    return shard.to(bench.device)


def score(policy: RankModel, shards: Sequence[PackedShard], drift: float, seed: int) -> list[torch.Tensor]:
    """Old log-probs: the policy's own plus normal noise of standard deviation `drift`, float32 [R] on the CPU per shard."""
    generator = torch.Generator().manual_seed(seed)
    return [
        values.cpu() + drift * torch.randn(values.shape, generator=generator)
        for values in policy.log_probs(shards)
    ]


def with_old_log_probs(shards: Sequence[PackedShard], scores: Sequence[torch.Tensor]) -> list[PackedShard]:
    return [
        shard.with_old_log_probs(old.to(shard.labels.device))
        for shard, old in zip(shards, scores, strict=True)
    ]
