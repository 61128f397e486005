"""Sizes of a rank's tensors for a full micro-batch, and what decides which tensors a layer keeps."""

from dataclasses import dataclass

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.layout import micro_batch_tokens
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT


def uses_transformer_engine(case: Case) -> bool:
    """As `choose_layer_spec` on the machine, with the package installed."""
    model = case.config.model
    if model.layer_spec == "auto":
        return model.dtype == "bfloat16" and not case.machine.on_cpu
    return model.layer_spec == "transformer_engine"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a rank's tensors."""

    hidden: int
    query: float
    key: float
    ffn: float
    heads: float
    head_size: int
    tokens: float
    """T: of a full micro-batch."""
    residual_tokens: float
    """t."""
    rows: float
    """Response tokens among the T."""
    context: int
    """Context-parallel ranks."""
    element: int
    """Bytes of an activation."""

    @property
    def hidden_bytes(self) -> float:
        """Of the residual stream."""
        return self.residual_tokens * self.hidden * self.element


def sizes_of(case: Case) -> Sizes:
    """For a full micro-batch of responses of the end of training."""
    architecture, parallel, work = case.architecture, case.config.parallel, case.workload()
    tp = parallel.tensor_model_parallel_size
    tokens = micro_batch_tokens(case.config) / parallel.context_parallel_size
    mean = work.prompt_tokens + work.response.mean
    return Sizes(
        hidden=architecture.hidden_size,
        query=architecture.size("query") / tp,
        key=architecture.size("key") / tp,
        ffn=architecture.size("ffn") / tp,
        heads=architecture.num_attention_heads / tp,
        head_size=architecture.kv_channels,
        tokens=tokens,
        residual_tokens=tokens / tp if parallel.sequence_parallel else tokens,
        rows=tokens * work.response.mean / mean,
        context=parallel.context_parallel_size,
        element=BYTES_PER_ELEMENT[case.config.model.dtype],
    )


def fp8_scale(case: Case) -> float:
    """Bytes of a kept FP8 element, its share of the scales included; 0 without FP8."""
    model = case.config.model
    return 0.0 if model.fp8 == "none" else 1 + 4 / 128 if model.fp8_recipe == "blockwise" else 1.0
