"""The trainer's own layers on one rank: attention, the host's time, the operations between the products."""

import megatron_fipo.model  # noqa: F401  isort: skip (the CPU platform, before anything imports Megatron-Core)

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_fipo.calibrate.messages import Measured, Message, Observed
from megatron_fipo.calibrate.shapes import (
    MOST_ON_CPU,
    attention_operations,
    layer_weights,
    packs,
    pairs,
    shortened,
    sliced,
)
from megatron_fipo.calibrate.timing import finish, timed
from megatron_fipo.config import ParallelConfig
from megatron_fipo.model import mcore, parallel
from megatron_fipo.model.build import set_activation, transformer_config
from megatron_fipo.model.layer_spec import block_spec, choose_layer_spec
from megatron_fipo.plan.case import Case

SHORT_PACK = (16,)
"""So few tokens that the device waits for the host."""


def measure(case: Case, device: torch.device, budget_s: float) -> Iterator[Message]:
    """Features: of `attention_forward` and `attention_backward` (operations,), of `layer_host` (layers,), of `layer` (tokens,
    pairs of query and key, layers), forward and backward.
    """
    with one_rank(device, case.config.seed):
        layers = Layers(case, device)
        found = packs(case)
        if device.type == "cpu":
            found = list(dict.fromkeys(shortened(layers.architecture, each, MOST_ON_CPU) for each in found))
        each = budget_s / (3 * len(found) + 1)
        yield layers.host(each)
        for lengths in found:
            yield from layers.attention(lengths, each)
        yield layers.complete(layers.within(found[0]), each)
        yield Observed("reserved_bytes", reserved_bytes(device))


@contextmanager
def one_rank(device: torch.device, seed: int) -> Iterator[None]:
    """A world of one rank, and Megatron-Core's groups in it, while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            parallel.initialize(ParallelConfig(), seed)
            yield
        finally:
            parallel.destroy()
            dist.destroy_process_group()


class Layers:
    """Two layers of a rank as the trainer builds and wraps them, at one tensor-parallel rank's sizes.

    They are those of a model without tensor parallelism, so they communicate nothing.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        model = case.config.model
        self.device = device
        self.weights = layer_weights(case)
        self.architecture = sliced(case.architecture, case.config.parallel.tensor_model_parallel_size)
        spec = choose_layer_spec(model.layer_spec, model.dtype)
        config = transformer_config(self.architecture, model, ParallelConfig(), spec)
        block = TransformerBlock(
            config,
            block_spec(config, spec, None),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
        ).to(device)
        set_activation(block)
        attention = block.layers[0].self_attention
        self.core, self.mask = attention.core_attention, attention.attn_mask_type
        self.dtype = config.params_dtype
        self.multiple = model.token_multiple
        module = Float16Module(config, block) if config.bf16 else block
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.module = DistributedDataParallel(config, settings, module)
        mcore.fuse_gradient_accumulation(self.module)
        self.rotary = RotaryEmbedding(
            self.architecture.kv_channels,
            rotary_percent=1.0,
            rotary_base=self.architecture.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )

    def within(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """A pack of a few passes' time on a CPU; as it is on a GPU."""
        if self.device.type == "cuda":
            return lengths
        per_token = sum(weight.operations(1) for weight in self.weights)
        most = max(lengths[0], int(3 * MOST_ON_CPU / per_token))
        return lengths[: max(1, most // lengths[0])]

    def host(self, budget_s: float) -> Measured:
        """A pack of a few tokens, forward and backward."""
        seconds = timed(self._passes(SHORT_PACK), self.device, budget_s)
        return Measured("layer_host", (float(self.architecture.num_layers),), seconds)

    def complete(self, lengths: tuple[int, ...], budget_s: float) -> Measured:
        """Forward and backward."""
        features = float(sum(lengths)), pairs(lengths), float(self.architecture.num_layers)
        return Measured("layer", features, timed(self._passes(lengths), self.device, budget_s))

    def attention(self, lengths: tuple[int, ...], budget_s: float) -> Iterator[Message]:
        """The core attention of a layer. The backward pass is what both passes take longer than the forward pass."""
        tokens, model = sum(lengths), self.architecture
        query = self._random(tokens, model.num_attention_heads, model.kv_channels)
        key, value = (self._random(tokens, model.num_query_groups, model.kv_channels) for _ in range(2))
        packed = packed_parameters(lengths, self.device)
        gradient = torch.randn(tokens, model.size("query"), dtype=self.dtype, device=self.device)

        def forward() -> torch.Tensor:
            return self.core(
                query,
                key,
                value,
                None,
                attn_mask_type=self.mask,
                packed_seq_params=packed,
            )

        def both() -> None:
            query.grad = key.grad = value.grad = None
            forward().backward(gradient)

        operations = attention_operations(model, lengths)
        one = timed(forward, self.device, budget_s)
        yield Measured("attention_forward", (operations,), one)
        first = float(np.median(one))
        backward = tuple(max(seconds - first, seconds / 10) for seconds in timed(both, self.device, budget_s))
        yield Measured("attention_backward", (2 * operations,), backward)

    def _passes(self, lengths: tuple[int, ...]):
        tokens = -(-sum(lengths) // self.multiple) * self.multiple
        lengths = (*lengths[:-1], lengths[-1] + tokens - sum(lengths))
        hidden = self._random(tokens, 1, self.architecture.hidden_size)
        gradient = torch.randn_like(hidden)
        packed = packed_parameters(lengths, self.device)
        rotation = self.rotary(max(lengths), packed_seq=True)

        def passes() -> None:
            hidden.grad = None
            output = self.module(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=rotation,
                packed_seq_params=packed,
            )
            output.backward(gradient)

        return passes

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=True)


def packed_parameters(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Megatron's description of a pack without padding."""
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def reserved_bytes(device: torch.device) -> float:
    """Bytes that this process occupies beside its tensors: of the GPU, if no other process uses it, or of the host."""
    if device.type == "cuda":
        finish(device)
        free, size = torch.cuda.mem_get_info(device)
        return float(size - free - torch.cuda.memory_reserved(device))
    return float(psutil.Process().memory_info().rss)
