"""A small random transformers model of each family, packed inputs, and the same model in Megatron-Core."""

from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_fipo.checkpoint.hf_import import load_hf_weights
from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.model import parallel as model_parallel
from megatron_fipo.model.attention import zigzag_owner
from megatron_fipo.model.build import build_model

VOCAB = 101
LENGTHS = (5, 33, 9, 1, 18, 70)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MIXTURE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "qwen3": (
        Qwen3Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "head_dim": 16},
    ),
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "qwen3_moe": (Qwen3MoeConfig, {**MIXTURE, "norm_topk_prob": True}),
    "qwen3_moe-mixed": (Qwen3MoeConfig, {**MIXTURE, "norm_topk_prob": False, "mlp_only_layers": [0, 2]}),
}
"""By name of the family and of a variant of it."""


def make_reference(folder: Path, tied: bool = False, family: str = "qwen2", **overrides) -> PreTrainedModel:
    """A random fp32 model (biases and norms random too), saved in `folder`."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config_class, variant = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **{**sizes, **variant, **overrides},
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


def build(
    folder: Path, parallel: ParallelConfig, dtype: str = "float32", recompute: str = "none"
) -> list[torch.nn.Module]:
    model_parallel.initialize(parallel, seed=1)
    chunks = build_model(folder, ModelConfig(path=str(folder), dtype=dtype, recompute=recompute), parallel)
    load_hf_weights(chunks, folder)
    return chunks


def pack(parallel: ParallelConfig) -> tuple[torch.Tensor, PackedSeqParams, torch.Tensor]:
    """(token ids [1, T] of this context-parallel rank, parameters, origin [T]).

    The origin of a token is its index in the unpadded concatenation of all sequences; -1 for padding.
    """
    multiple = 2 * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    ids = sequences()
    lengths = torch.tensor([-(-len(sequence) // multiple) * multiple for sequence in ids])
    padded = torch.cat(
        [
            torch.nn.functional.pad(sequence, (0, int(n) - len(sequence)))
            for sequence, n in zip(ids, lengths, strict=True)
        ]
    )
    real = torch.cat([torch.arange(int(n)) < len(sequence) for sequence, n in zip(ids, lengths, strict=True)])
    origin = torch.where(real, real.cumsum(0) - 1, -1)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    owner, _ = zigzag_owner(positions, lengths.repeat_interleave(lengths), parallel.context_parallel_size)
    mine = owner == parallel_state.get_context_parallel_rank()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, cu_seqlens, cu_seqlens, longest, longest)
    return padded[mine][None], packed, origin[mine]


def logits_of_rank(
    folder: Path, parallel: ParallelConfig, dtype: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(logits [T, V/tp], origin [T], tensor-parallel rank) on the last pipeline stage; None elsewhere."""
    chunks = build(folder, parallel, dtype)
    input_ids, packed, origin = pack(parallel)

    def forward_step(iterator, model):
        output = model(input_ids=input_ids, position_ids=None, attention_mask=None, packed_seq_params=packed)
        return output, lambda logits, non_loss_data: logits

    many = len(chunks) > 1
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if many else None,
            model=chunks if many else chunks[0],
            num_microbatches=2 if many else 1,
            seq_length=input_ids.shape[1] * parallel.context_parallel_size,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parallel_state.is_pipeline_last_stage():
        return None
    return outputs[-1][0], origin, parallel_state.get_tensor_model_parallel_rank()


def gather_logits(results: list, tensor_parallel_size: int) -> torch.Tensor:
    """[all real tokens, V] from the results of all ranks."""
    width = next(result[0].shape[1] for result in results if result is not None)
    logits = torch.full((sum(LENGTHS), width * tensor_parallel_size), torch.nan)
    for result in results:
        if result is not None:
            shard, origin, rank = result
            real = origin >= 0
            logits[origin[real], rank * width : (rank + 1) * width] = shard[real].float()
    return logits[:, :VOCAB]
