"""Megatron-Core's GPTModel with a last stage that returns log-probs of the response instead of logits."""

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_fipo.model import mcore
from megatron_fipo.model.logprob_head.head import HeadRequest, response_log_probs


class LogProbGPTModel(GPTModel):
    """GPTModel for Megatron-Core 0.16 and 0.17, which have no hook after the final norm.

    `forward` passes `labels` unchanged to `_postprocess`, so a `HeadRequest` is passed in place of the
    labels. From 0.18 on the public `output_processor` argument is used instead, and this class changes
    nothing.
    """

    def _postprocess(self, hidden_states, labels=None, **kwargs):
        if not isinstance(labels, HeadRequest):
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        return apply_head(self, hidden_states, labels) if self.post_process else hidden_states


def apply_head(model: LanguageModule, hidden_states: torch.Tensor, request: HeadRequest) -> torch.Tensor:
    """Log-probs [R] and entropy [R] as [2, R] from the hidden states after the final norm of a last stage."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return _apply_head(hidden_states, weight, request, model.config.sequence_parallel, model.pg_collection.tp)


def _apply_head(hidden_states, weight, request: HeadRequest, sequence_parallel: bool, group) -> torch.Tensor:
    """[2, R]. One tensor, because Megatron-Core's schedule asks the last stage's output for its device if there are experts."""
    return torch.stack(response_log_probs(hidden_states, weight, request, group, sequence_parallel))


def _output_processor(hidden_states, output_layer, output_weight, context, config, **_: Any) -> torch.Tensor:
    weight = output_layer.weight if output_weight is None else output_weight
    return _apply_head(hidden_states, weight, context, config.sequence_parallel, output_layer.tp_group)


def forward_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    packed: PackedSeqParams,
    request: HeadRequest,
) -> Any:
    """Run one pipeline stage: log_probs [R] and entropy [R] as [2, R] on the last stage, hidden states on the others."""
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": None,
        "packed_seq_params": packed,
    }
    if mcore.HAS_OUTPUT_PROCESSOR and not mcore.USES_HYBRID_MODEL:
        return model(**arguments, output_processor=_output_processor, output_processor_context=request)
    return model(**arguments, labels=request)
