"""Activations of one layer for one micro-batch on one rank: what is kept until its backward pass, and the peak within that.

Notation: h hidden size; q, k, f this rank's query, key and feed-forward sizes (divided by tp); T the rank's tokens; t those
of its residual stream (T/tp with sequence parallelism). Counts are of elements per token. Autograd keeps:

                       Transformer Engine        portable
    residual stream    2h  before each norm      2h
    norms              2h  their outputs         2h fused; 4h on a CPU, where torch's norm keeps its normalized input too
    query and output   2q  rotated, attended     4q  gathered, padded, attended, restored to the order of the pack
    key and value      2k  rotated key, value    4k  gathered and padded, of all context-parallel ranks
    feed-forward       3f  gate and up, product  3f

The portable layers also keep the rotary tables, 4 · head size, and with context parallelism the mask that
`scaled_dot_product_attention` makes, float32 [T, length of the sequence]; recomputation keeps one of bool per micro-batch
instead. Sequences are padded in buckets of lengths within a factor of two, which is not counted: up to a tenth of a layer.
Both keep the log-sum-exp of each head, float32.

With full recomputation only the layer's input h is kept; with selective the portable layers keep 3q + 3k of attention: the
rotated query and key, the projection's output that the value is a view of, and the attended values.

In FP8 the inputs of products are kept in a byte: norm outputs h, a copy of the attended values q, the product f. Blockwise
scales add 1/32 of that.

The peak of a layer's backward pass is in its feed-forward part, where all of its activations still exist. With Transformer
Engine 3f more, found on one H200; in the portable layers the product is free again and 3f of gradients exist: 2f, on a CPU
one factor of them besides: 3f. The gradient of the residual stream, h, exists throughout. A layer with experts: `expert_activations.py`.

Worked example, Transformer Engine in bfloat16, h = q = 896, k = 128, f = 4,864: 4h + 2q + 2k + 3f = 20,224 elements,
40,448 bytes per token and layer; of 24 layers and 20,480 tokens 18.5 GiB.
"""

from dataclasses import dataclass

from megatron_fipo.families.family import Layers
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.memory.expert_activations import expert_bytes, expert_workspace
from megatron_fipo.plan.memory.sizes import Sizes, fp8_scale, uses_transformer_engine


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer for one micro-batch."""

    kept: float
    """From forward to backward, without recomputation of complete layers."""
    backward: float
    """In addition to `kept`, at the peak of its backward pass."""


def layer_of(case: Case, sizes: Sizes, kind: Layers) -> Layer:
    """A layer's activations under `model.recompute` none or selective; full recomputation builds on the same numbers."""
    engine = uses_transformer_engine(case)
    if kind is Layers.EXPERTS:
        kept = _attention(case, sizes, engine) + expert_bytes(case, sizes) + _residual(case, sizes)
        return Layer(kept=kept, backward=expert_workspace(case, sizes))
    kept = _attention(case, sizes, engine) + _feed_forward(case, sizes) + _residual(case, sizes)
    return Layer(kept=kept, backward=_backward(case, sizes, engine))


def _residual(case: Case, sizes: Sizes) -> float:
    """The residual stream before both norms, and what the norms keep."""
    fp8 = fp8_scale(case)
    norms = 2 * fp8 if fp8 else sizes.element * (4 if case.machine.on_cpu else 2)
    return sizes.residual_tokens * sizes.hidden * (2 * sizes.element + norms)


def _attention(case: Case, sizes: Sizes, engine: bool) -> float:
    head_norm = _head_norm(case, sizes) if case.architecture.qk_layernorm else 0.0
    statistics = 4 * sizes.heads * sizes.tokens
    if engine:
        elements = sizes.tokens * (2 * sizes.query + 2 * sizes.key)
        return (
            sizes.element * elements + fp8_scale(case) * sizes.tokens * sizes.query + statistics + head_norm
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
    product = fp8_scale(case) or sizes.element
    return sizes.tokens * sizes.ffn * (2 * sizes.element + product)


def _backward(case: Case, sizes: Sizes, engine: bool) -> float:
    """The largest of the moments of a layer's backward pass, relative to all that the layer has kept.

    In the feed-forward part as above. In the first projection's backward pass the product is free, the gradient of gate and
    up exists, and the gradient of all T tokens; with few tokens in the residual stream and narrow shards that is more.
    """
    ffn = sizes.ffn * sizes.tokens * sizes.element
    complete = sizes.hidden * sizes.tokens * sizes.element
    activation = (3 if engine or case.machine.on_cpu else 2) * ffn
    projection = complete - ffn
    if engine and case.config.parallel.sequence_parallel:
        projection += complete  # its input, gathered again
    output = ffn + (complete if case.config.parallel.sequence_parallel else 0.0)
    return max(activation, projection, output) + sizes.hidden_bytes
