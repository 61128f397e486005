"""Activations of one layer for one micro-batch on one rank: what is kept until its backward pass, and the peak within that.

Notation: h hidden size; q, k, f this rank's query, key and feed-forward sizes (divided by tp); T the rank's tokens; t those
of its residual stream (T/tp with sequence parallelism). Counts are of elements per token. Autograd keeps:

                       Transformer Engine        portable
    residual stream    2h  before each norm      2h
    norms              2h  their outputs         2h fused; 4h on a CPU, where torch's norm keeps its normalized input too
    query and output   2q  rotated, attended     4q  gathered, padded, attended, restored to the order of the pack
    key and value      2k  rotated key, value    4k  gathered and padded, of all context-parallel ranks
    feed-forward       3f  gate and up, product  3f  fused; 5f on a CPU: SiLU and up + 0 besides

The portable layers also keep the rotary tables, 4 · head size, and with context parallelism the mask that
`scaled_dot_product_attention` makes, float32 [T, length of the sequence]; recomputation keeps one of bool per micro-batch
instead. Sequences are padded in buckets of lengths within a factor of two, which is not counted: up to a tenth of a layer.
Both keep the log-sum-exp of each head, float32.

With full recomputation only the layer's input h is kept; with selective the portable layers keep 3q + 3k of attention: the
rotated query and key, the projection's output that the value is a view of, and the attended values.

In FP8 the inputs of products are kept in a byte: norm outputs h, a copy of the attended values q, the product f. Blockwise
scales add 1/32 of that.

The peak of a layer's backward pass is in its feed-forward part, where all of its activations still exist. With Transformer
Engine 3f more, found on one H200; in the portable layers the product is free again and 3f of gradients exist: 2f. The
gradient of the residual stream, h, exists throughout.

Worked example, Transformer Engine in bfloat16, h = q = 896, k = 128, f = 4,864: 4h + 2q + 2k + 3f = 20,224 elements,
40,448 bytes per token and layer; of 24 layers and 20,480 tokens 18.5 GiB.
"""

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


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer for one micro-batch."""

    kept: float
    """From forward to backward, without recomputation of complete layers."""
    backward: float
    """In addition to `kept`, at the peak of its backward pass."""


def layer_of(case: Case, sizes: Sizes) -> Layer:
    """A layer's activations under `model.recompute` none or selective; full recomputation builds on the same numbers."""
    engine = uses_transformer_engine(case)
    kept = _attention(case, sizes, engine) + _feed_forward(case, sizes) + _residual(case, sizes)
    return Layer(kept=kept, backward=_backward(case, sizes, engine))


def _fp8_scale(case: Case) -> float:
    """Bytes of a kept FP8 element, its share of the scales included; 0 without FP8."""
    model = case.config.model
    return 0.0 if model.fp8 == "none" else 1 + 4 / 128 if model.fp8_recipe == "blockwise" else 1.0


def _residual(case: Case, sizes: Sizes) -> float:
    """The residual stream before both norms, and what the norms keep."""
    fp8 = _fp8_scale(case)
    norms = 2 * fp8 if fp8 else sizes.element * (4 if case.machine.on_cpu else 2)
    return sizes.residual_tokens * sizes.hidden * (2 * sizes.element + norms)


def _attention(case: Case, sizes: Sizes, engine: bool) -> float:
    head_norm = _head_norm(case, sizes) if case.architecture.qk_layernorm else 0.0
    statistics = 4 * sizes.heads * sizes.tokens
    if engine:
        elements = sizes.tokens * (2 * sizes.query + 2 * sizes.key)
        return (
            sizes.element * elements + _fp8_scale(case) * sizes.tokens * sizes.query + statistics + head_norm
        )
    tables = 4 * sizes.head_size * sizes.tokens
    if case.config.model.recompute == "selective":
        # The value is a view of the projection's output; a head norm keeps that output anyway.
        projection = 0.0 if head_norm else sizes.query + 2 * sizes.key
        elements = sizes.tokens * (2 * sizes.query + sizes.key + projection) + tables
        return sizes.element * elements + head_norm
    elements = sizes.tokens * (4 * sizes.query + 4 * sizes.key * sizes.context) + tables
    mask = 4 * _mask_elements(case, sizes) if sizes.context > 1 else 0.0
    return sizes.element * elements + mask + statistics + head_norm


def mask_bytes(case: Case, sizes: Sizes) -> float:
    """Of the bool mask of a micro-batch, all layers together, that recomputation in portable layers keeps with context
    parallelism."""
    kept = sizes.context > 1 and case.config.model.recompute != "none" and not uses_transformer_engine(case)
    return _mask_elements(case, sizes) if kept else 0.0


def _mask_elements(case: Case, sizes: Sizes) -> float:
    """Tokens of the rank × the length of the sequence that each is in, over all context-parallel ranks."""
    work = case.workload()
    return sizes.tokens * work.mean_square / (work.prompt_tokens + work.response.mean)


def _head_norm(case: Case, sizes: Sizes) -> float:
    """Norms of query and key heads: their input, with the projection's output that it is a part of; on a CPU the
    normalized input too."""
    elements = 2 * sizes.query + 2 * sizes.key
    if case.machine.on_cpu:
        elements += sizes.query + sizes.key
    return sizes.element * sizes.tokens * elements


def _feed_forward(case: Case, sizes: Sizes) -> float:
    """With experts, every token counts once per expert that processes it, with its input and its output before they add up."""
    fp8 = _fp8_scale(case)
    unfused = case.machine.on_cpu
    product = fp8 or sizes.element
    of_token = sizes.ffn * (sizes.element * (4 if unfused else 2) + product)
    if case.experts.count > 1:
        of_token += sizes.hidden * (product + sizes.element)
        return sizes.tokens * of_token * case.experts.per_token
    return sizes.tokens * of_token


def _backward(case: Case, sizes: Sizes, engine: bool) -> float:
    """The largest of the moments of a layer's backward pass, relative to all that the layer has kept.

    In the feed-forward part as above. In the first projection's backward pass the product is free, the gradient of gate and
    up exists, and the gradient of all T tokens; with few tokens in the residual stream and narrow shards that is more.
    """
    routed = case.experts.per_token if case.experts.count > 1 else 1
    ffn = sizes.ffn * sizes.tokens * routed * sizes.element
    complete = sizes.hidden * sizes.tokens * routed * sizes.element
    unfused = case.machine.on_cpu
    activation = (3 if engine else 2) * ffn
    projection = complete - (3 if unfused else 1) * ffn
    if engine and case.config.parallel.sequence_parallel:
        projection += complete  # its input, gathered again
    output = ffn + (complete if case.config.parallel.sequence_parallel else 0.0)
    return max(activation, projection, output) + sizes.hidden_bytes
