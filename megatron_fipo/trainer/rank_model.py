"""One rank's model and optimizer: scoring, policy steps and supervised steps through Megatron-Core's schedule.

`log_probs` scores responses, `policy_step` takes one optimizer step on the FIPO family of losses, `supervised_step` one
on plain cross-entropy, which `supervised_loss` measures. All run the same forward over `PackedShard`s through
Megatron-Core's pipeline schedule, so every combination of tensor, sequence, pipeline, context and data parallelism is
configuration.

Normalization happens once: the loss function returns a sum and a count (`calculate_per_token_loss`), Megatron sums
gradients and counts over micro-batches and over the data × context ranks, and divides at the end.
"""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_fipo import progress
from megatron_fipo.batching.shard import PackedShard
from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.config import HeadConfig, ModelConfig, OptimizerSettings, ParallelConfig
from megatron_fipo.config.gpu_rules import check_accelerators
from megatron_fipo.environment import find_accelerators
from megatron_fipo.errors import UserError
from megatron_fipo.model import mcore
from megatron_fipo.model.build import build_model
from megatron_fipo.model.gpt import forward_log_probs
from megatron_fipo.model.logprob_head.budget import DECIDED_AFTER, device_memory, logits_budget_mb
from megatron_fipo.model.logprob_head.head import HeadRequest
from megatron_fipo.model.megatron_precision import optimizer_precision
from megatron_fipo.model.routing import ChunkRouting, RankRoutes
from megatron_fipo.objective.config import ObjectiveConfig
from megatron_fipo.objective.kernels.choice import kernels_obstacle
from megatron_fipo.objective.loss import policy_loss
from megatron_fipo.objective.statistics import Statistics


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step. Statistics and weights exist on the last pipeline stage only."""

    grad_norm: float
    skipped: bool
    """True if the gradient was not finite: parameters and optimizer state are unchanged."""
    influence_weights: list[torch.Tensor]
    """[R] per micro-batch, on this rank's rows."""
    read_statistics: Callable[[], dict[str, float]]

    @cached_property
    def statistics(self) -> dict[str, float]:
        """What is reported. The first access copies it to the host, and so waits for the device: read it after the last step."""
        return self.read_statistics()


class RankModel:
    """Model and optimizer of one rank. Needs `parallel.initialize` first. UserError if the settings cannot run here."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        head: HeadConfig,
        optimizer: OptimizerSettings,
        temperature: float,
        device: torch.device,
    ) -> None:
        check_accelerators(model, optimizer, find_accelerators())
        if reason := kernels_obstacle(head.kernels, device):
            raise UserError(f"head.kernels={head.kernels} cannot run here: {reason}; set it to auto or torch")
        self.device = device
        self.head = head
        self._steps = 0
        self.temperature = temperature
        self.clip_grad = optimizer.clip_grad
        self.weight_decay = optimizer.weight_decay
        self.modules = build_model(Path(model.path), model, parallel, head.kernels)
        self.model_config = self.modules[0].config
        self.vocab_size = self.modules[0].unpadded_vocab_size
        self.chunks = self._wrap(parallel, optimizer)
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(model, optimizer), self.chunks, use_gloo_process_groups=False
        )
        self.routing = [ChunkRouting(module) for module in self.modules]
        self.architecture = self.modules[0].architecture
        self._connect(parallel)
        self.context_group = parallel_state.get_context_parallel_group()
        self.statistics_group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def _wrap(self, parallel: ParallelConfig, optimizer: OptimizerSettings) -> list[DistributedDataParallel]:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=optimizer.distributed,
            overlap_grad_reduce=parallel.overlap_communication,
            fp8_param_gather=self.model_config.fp8_param,
        )
        chunks = []
        for index, module in enumerate(self.modules):
            module = module.to(self.device)
            if self.model_config.bf16:
                module = Float16Module(self.model_config, module)
            disable_bucketing = index > 0
            layout = mcore.parameter_layout(module, ddp_config, disable_bucketing)
            chunks.append(
                DistributedDataParallel(
                    self.model_config, ddp_config, module, disable_bucketing=disable_bucketing, **layout
                )
            )
        fused = [mcore.fuse_gradient_accumulation(chunk) for chunk in chunks]
        self.fuses_gradients = all(fused)
        return chunks

    def _connect(self, parallel: ParallelConfig) -> None:
        """Set the callbacks of Megatron's schedule to the optimizer and the gradient buffers."""
        config = self.model_config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_communication:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            grad_sync = [chunk.start_grad_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            config.grad_sync_func = grad_sync if len(grad_sync) > 1 else grad_sync[0]

    def load_hf(self, folder: Path) -> None:
        """Load the weights of a Hugging Face folder; the optimizer's master copies are exact even if parameters round (FP8)."""
        exact = load_hf_weights(self.modules, folder)
        self.optimizer.reload_model_params(self._named(exact) if exact else None)

    def _named(self, exact: dict[torch.nn.Parameter, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """All parameters by Megatron's names of chunk and parameter, with the values of `exact` if present."""
        keys = (
            ["model"] if len(self.modules) == 1 else [f"model{index}" for index in range(len(self.modules))]
        )
        return {
            key: {name: exact.get(parameter, parameter) for name, parameter in module.named_parameters()}
            for key, module in zip(keys, self.modules, strict=True)
        }

    @property
    def is_last_stage(self) -> bool:
        return parallel_state.is_pipeline_last_stage()

    def log_probs(
        self,
        shards: Sequence[PackedShard],
        replayed: Sequence[RankRoutes] | None = None,
        chosen: Sequence[RankRoutes] | None = None,
    ) -> list[torch.Tensor]:
        """Score the response rows without gradient: [R] fp32 per shard on the last pipeline stage, an empty list elsewhere.

        One of each per shard: the routes that are replayed, and the places (`new_routes`) for the routers' own choices.
        """

        def collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return output[0].clone()  # without the entropies

        with torch.no_grad():
            return self._run(
                shards, lambda shard: collect, forward_only=True, replayed=replayed, chosen=chosen
            )

    def policy_step(
        self,
        shards: Sequence[PackedShard],
        objective: ObjectiveConfig,
        lr: float,
        replayed: Sequence[RankRoutes] | None = None,
    ) -> StepResult:
        """One optimizer step on a mini-batch, given old log-probs and advantages in the shards' rows.

        `replayed` are the routes of each shard in a model with experts; None lets the routers choose.

        Collectives besides the model's: one all-gather over the context-parallel group per micro-batch (the FutureKL
        aggregates), and two small all-reduces of the statistics over data × context ranks per step.
        """

        def loss(shard: PackedShard) -> Callable:
            return partial(
                _policy_loss,
                shard=shard,
                objective=objective,
                group=self.context_group,
                kernels=self.head.kernels,
            )

        records, grad_norm, skipped = self._update(
            shards, loss, lr, objective.entropy_coefficient != 0, replayed
        )
        if not self.is_last_stage:
            return StepResult(grad_norm, skipped, [], dict)
        merged = records[0]["statistics"]
        for record in records[1:]:
            merged = merged.merge(record["statistics"])
        merged = merged.reduce(self.statistics_group)
        weights = [record["influence_weights"] for record in records]
        return StepResult(grad_norm, skipped, weights, merged.finalize)

    def supervised_step(self, shards: Sequence[PackedShard], lr: float) -> StepResult:
        """One optimizer step on the cross-entropy of the response rows, averaged over all tokens of the mini-batch."""
        records, grad_norm, skipped = self._update(shards, lambda shard: _cross_entropy, lr, False)
        if not self.is_last_stage:
            return StepResult(grad_norm, skipped, [], dict)
        sums = torch.stack([record["sums"] for record in records]).sum(dim=0)
        torch.distributed.all_reduce(sums, group=self.statistics_group)

        def read() -> dict[str, float]:
            total, tokens = sums.tolist()
            return {"loss": total / max(tokens, 1.0), "tokens": tokens}

        return StepResult(grad_norm, skipped, [], read)

    def supervised_loss(self, shards: Sequence[PackedShard]) -> float | None:
        """Cross-entropy per response row without an update, averaged as in `supervised_step`; None before the last stage.

        One all-reduce of two numbers over the data × context ranks.
        """
        log_probs = self.log_probs(shards)
        if not self.is_last_stage:
            return None
        rows = torch.cat(log_probs).double()
        sums = torch.stack((-rows.sum(), torch.full_like(rows.sum(), rows.numel())))
        torch.distributed.all_reduce(sums, group=self.statistics_group)
        total, tokens = sums.tolist()
        return total / max(tokens, 1.0)

    def _update(
        self,
        shards: Sequence[PackedShard],
        loss: Callable[[PackedShard], Callable],
        lr: float,
        entropy_gradient: bool,
        replayed: Sequence[RankRoutes] | None = None,
    ) -> tuple[list[dict[str, Any]], float, bool]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        records = self._run(
            shards, loss, forward_only=False, entropy_gradient=entropy_gradient, replayed=replayed
        )
        for routing in self.routing:
            routing.end_step()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # Megatron marks norms and biases with 0 and expects the scheduler to apply it.
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = bool(found_inf) or not math.isfinite(grad_norm)
        if not skipped:
            if self.clip_grad > 0:
                parameters = [
                    parameter for group in self.optimizer.param_groups for parameter in group["params"]
                ]
                decoupled = mcore.uses_decoupled_gradients(self.optimizer)
                clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm, decoupled)
            self.optimizer.step_with_ready_grads()
        self._steps += 1
        if self._steps == DECIDED_AFTER and self.head.logits_memory_mb is None:
            self._decide_logits_budget()
        return records, grad_norm, skipped

    def _decide_logits_budget(self) -> None:
        memory = device_memory(self.device)
        budget = 0 if memory is None else logits_budget_mb(memory)
        self.head = replace(self.head, logits_memory_mb=budget)

    def _run(
        self,
        shards: Sequence[PackedShard],
        loss: Callable[[PackedShard], Callable],
        forward_only: bool,
        entropy_gradient: bool = False,
        replayed: Sequence[RankRoutes] | None = None,
        chosen: Sequence[RankRoutes] | None = None,
    ) -> list[Any]:
        """Run Megatron's schedule over the micro-batches; returns the records of the loss functions on the last stage."""

        def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Any, Callable]:
            progress.advance()
            shard, *routes = next(iterator)
            with self._routed(model, *routes):
                output = forward_log_probs(
                    model,
                    shard.input_ids,
                    shard.position_ids,
                    packed_sequence_parameters(shard),
                    self._request(shard, entropy_gradient),
                )
            return output, loss(shard)

        absent: list[None] = [None] * len(shards)
        inputs = list(zip(shards, replayed or absent, chosen or absent, strict=True))
        iterators = [iter(inputs) for _ in self.chunks]
        many = len(self.chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=self.chunks if many else self.chunks[0],
            num_microbatches=len(shards),
            seq_length=max(shard.input_ids.shape[1] for shard in shards)
            * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _routed(
        self, model: torch.nn.Module, replayed: RankRoutes | None, chosen: RankRoutes | None
    ) -> AbstractContextManager[None]:
        """The context of a chunk's forward pass, with the routes of one micro-batch for all chunks."""
        chunk = next(index for index, wrapped in enumerate(self.chunks) if wrapped is model)
        return self.routing[chunk].forward(
            None if replayed is None else replayed[chunk], None if chosen is None else chosen[chunk]
        )

    def new_routes(self, shards: Sequence[PackedShard]) -> list[RankRoutes]:
        """Empty places for the routers' choices in these micro-batches, for `log_probs`."""
        return [[[] for _ in self.chunks] for _ in shards]

    def _request(self, shard: PackedShard, entropy_gradient: bool) -> HeadRequest:
        return HeadRequest(
            row_index=shard.row_index,
            labels=shard.labels,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            settings=self.head,
            entropy_gradient=entropy_gradient,
        )


def _optimizer_config(model: ModelConfig, settings: OptimizerSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=settings.distributed,
        **optimizer_precision(model, settings),
    )


def packed_sequence_parameters(shard: PackedShard) -> PackedSeqParams:
    """Megatron's description of a pack. Padding belongs to its sequence: it comes last, so causal attention never sees it."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=shard.cu_seqlens_padded,
        cu_seqlens_kv=shard.cu_seqlens_padded,
        cu_seqlens_q_padded=shard.cu_seqlens_padded,
        cu_seqlens_kv_padded=shard.cu_seqlens_padded,
        max_seqlen_q=shard.max_seqlen,
        max_seqlen_kv=shard.max_seqlen,
    )


def _policy_loss(
    output: torch.Tensor,
    *,
    shard: PackedShard,
    objective: ObjectiveConfig,
    group: torch.distributed.ProcessGroup,
    kernels: str,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    log_probs, entropy = output.unbind()
    loss = policy_loss(log_probs, entropy, shard.rows, objective, group, kernels)
    statistics: Statistics = loss.statistics
    return (
        loss.loss_sum,
        loss.normalizer.to(torch.int32),
        {"statistics": statistics, "influence_weights": loss.influence_weights},
    )


def _cross_entropy(
    output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total = -output[0].sum()
    tokens = torch.full((), output[0].numel(), dtype=torch.int32, device=total.device)
    return total, tokens, {"sums": torch.stack((total.detach(), tokens.float()))}
