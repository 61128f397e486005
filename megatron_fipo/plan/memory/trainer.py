"""Memory of a trainer rank: the peak of an optimizer step, by part.

The peak is at the start of a micro-batch's backward pass, when all micro-batches that the pipeline schedule holds in flight
have their activations. What exists only at another moment counts as far as it exceeds what the peak has in its place, so the
parts add up:

    weights, gradients, optimizer   `state.py`, exact
    reference model                 the initial weights, with a KL term
    activations                     chunk passes in flight × layers of a chunk × what a layer keeps (`activations.py`)
    layer workspace                 the peak of the last layer's backward pass, and with full recomputation its activations
    head                            what the output layer needs beyond that workspace, which is free at its time
    packs                           shards of two mini-steps, and old log-probs of the iteration
    routes                          the experts of each token of the iteration, which are replayed
    communication                   buffers that exist beside all of these
    sleeping engine                 what a colocated engine leaves on the device
    fragmentation                   the allocator's blocks without a tensor
    CUDA and libraries              outside of the allocator

Gradient buckets of the overlapped reduction and the gathered parameters are views of the flat buffers, so overlap adds
nothing. Gathered keys and values, and the gathers of sequence parallelism in Transformer Engine's layers, exist in
attention and in single products, where the feed-forward part's workspace is free.

Compared with: tensors of a step on one H200 (docs/benchmarks.md), and all allocations of a step of the portable layers in
float32 on 1 to 4 ranks (tests/plan/memory), also with experts. Not measured: Transformer Engine with tensor, context or
pipeline parallelism and with experts, portable layers on GPUs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from megatron_fipo.families.family import Layers
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Breakdown, Estimate, exact, total
from megatron_fipo.plan.experts import layer_counts, layer_kind, route_bytes, shard_route_bytes
from megatron_fipo.plan.layout import chunks_in_flight, micro_batches, mini_steps, vocabulary_columns
from megatron_fipo.plan.memory.activations import Layer, layer_of, mask_bytes
from megatron_fipo.plan.memory.expert_activations import dispatcher_bytes
from megatron_fipo.plan.memory.sizes import Sizes, sizes_of, uses_transformer_engine
from megatron_fipo.plan.memory.state import Stage, stage_state

TOKEN_BYTES = 16
"""Of a shard per token on the device: its id and position, int64."""
ROW_BYTES = 68
"""Of a shard per response token: indices and label (16), old log-prob, advantage, last row and rollout log-prob (16), and
the scan's tables (36)."""
SLAB = 128
"""The head's slabs are a multiple of this many columns wide."""
SLEEPING = Estimate(1.5 * 2**30, 0.5 * 2**30, 3.0 * 2**30, not_calibrated=frozenset({"sleeping engine"}))
"""CUDA context, graphs and communicators of a vLLM engine that sleeps at level 2."""


def trainer_memory(case: Case, stage: int) -> Breakdown:
    """Bytes of a trainer rank of pipeline stage `stage` at the peak of an iteration."""
    config = case.config
    state = stage_state(config, case.family, case.architecture, stage)
    sizes = sizes_of(case)
    activations, workspace, head = _step(case, state, sizes)
    parts = {
        **_state(case, state),
        "activations": _near(case, activations),
        "layer workspace": _near(case, workspace),
        "head": _near(case, head),
        "packs": _packs(case, state, sizes),
        "communication": exact(_communication(case, state, sizes)),
    }
    if case.architecture.experts is not None and config.model.router.replay != "none":
        parts["routes"] = _routes(case, state)
    if config.objective.kl_coefficient:
        parts["reference model"] = exact(state.weight_bytes)
    tensors = total(parts.values())
    if case.colocated:
        parts["sleeping engine"] = SLEEPING
    share = case.machine.fragmentation.times(1.0, "fragmentation")
    parts["fragmentation"] = Estimate(
        tensors.value * share.value,
        tensors.low * share.low,
        tensors.high * share.high,
        share.sources,
        share.not_calibrated,
    )
    parts["CUDA and libraries"] = case.machine.reserved_bytes.times(1.0, "CUDA and libraries")
    return Breakdown(parts)


def _state(case: Case, state: Stage) -> dict[str, Estimate]:
    """Exact, but for what no GPU has shown yet. FP8 blockwise was measured with 1 byte per matrix weight less, in steps of one
    micro-batch."""
    config = case.config
    parts = {
        "weights": exact(state.weight_bytes),
        "gradients": exact(state.gradient_bytes),
        "optimizer": exact(state.optimizer_bytes),
    }
    if config.model.fp8_param_gather:
        parts["weights"] = replace(parts["weights"], not_calibrated=frozenset({"weights kept in FP8"}))
    if config.optimizer.cpu_offload:
        parts["optimizer"] = replace(parts["optimizer"], not_calibrated=frozenset({"offloaded optimizer"}))
    return parts


def _near(case: Case, value: float) -> Estimate:
    """An estimate of tensors of a step with the interval that its check showed, or a wider one where there was none."""
    config = case.config
    parallel = config.parallel
    parallel_ranks = (
        parallel.tensor_model_parallel_size
        * parallel.context_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    if uses_transformer_engine(case):
        source = "tensors of a step, one H200, 2026-11-28"
        measured = parallel_ranks == 1 and config.model.recompute == "none"
    else:
        source = "allocations of a step, 1 to 4 ranks on a CPU"
        measured = case.machine.on_cpu
    if case.architecture.experts is not None:
        measured = measured and case.machine.on_cpu and parallel.expert_tensor_parallel_size == 1
    if measured:
        return Estimate(value, 0.95 * value, 1.05 * value, sources=frozenset({source}))
    return Estimate(
        value, 0.9 * value, 1.15 * value, not_calibrated=frozenset({"activations in this layout"})
    )


def _step(case: Case, state: Stage, sizes: Sizes) -> tuple[float, float, float]:
    """Bytes of activations, layer workspace, and head beyond that workspace."""
    full = case.config.model.recompute == "full"
    layers = {kind: layer_of(case, sizes, kind) for kind in layer_counts(case.architecture)}
    kept = {kind: sizes.hidden_bytes if full else layer.kept for kind, layer in layers.items()}
    passes = _passes(case, state)
    of_passes = [
        (count, sum(number * kept[kind] for kind, number in Counter(chunk).items()) + mask_bytes(case, sizes))
        for chunk, count in passes.items()
    ]
    activations = sum(count * of_pass for count, of_pass in of_passes)
    if with_experts := sum(case.architecture.has_experts(layer) for part in state.layers for layer in part):
        activations += with_experts * dispatcher_bytes(case, sizes)
    in_flight = sum(passes.values())
    if case.machine.on_cpu:  # the outputs that were sent, which a GPU frees after the send
        activations += (in_flight - (1 if state.has_output else 0)) * sizes.hidden_bytes
    workspace = max(_workspace(chunk, layers, kept, full) for chunk in passes)
    columns = vocabulary_columns(case)
    if _adds_embedding_gradients(case):
        workspace += columns * sizes.hidden * sizes.element
    if state.has_embedding:
        workspace = max(workspace, columns * sizes.hidden * sizes.element - of_passes[0][1])
    head = max(0.0, _head(case, sizes, columns) - workspace) if state.has_output else 0.0
    return activations, workspace, head


Chunk = tuple[Layers, ...]
"""Kinds of the layers of a model chunk."""


def _passes(case: Case, state: Stage) -> dict[Chunk, int]:
    """Forward passes in flight by chunk. Interleaved, each chunk in turn computes as many micro-batches as there are stages."""
    parallel = case.config.parallel
    chunks = [tuple(layer_kind(case.architecture, layer) for layer in chunk) for chunk in state.layers]
    in_flight = chunks_in_flight(parallel, state.index, micro_batches(case))
    turns = (index // parallel.pipeline_model_parallel_size for index in range(in_flight))
    return dict(Counter(chunks[turn % len(chunks)] for turn in turns))


def _workspace(
    chunk: Chunk, layers: Mapping[Layers, Layer], kept: Mapping[Layers, float], full: bool
) -> float:
    """The largest moment of a chunk's backward pass, relative to all that its layers have kept.

    That is in its last layer, or in the last of another kind if that needs more than the layers after it have freed.
    """
    most = freed = 0.0
    seen: set[Layers] = set()
    for kind in reversed(chunk):
        if kind not in seen:
            # With full recomputation the layer is computed again: all but its input is new, and so is its output.
            again = layers[kind].kept if full else 0.0
            most = max(most, layers[kind].backward + again - freed)
            seen.add(kind)
        if len(seen) == len(layers):
            break
        freed += kept[kind]
    return most


def _adds_embedding_gradients(case: Case) -> bool:
    """Whether the head returns zeros in the shape of the embedding, to which autograd adds the embedding's own gradient: a
    tied one on a single stage."""
    one_stage = case.config.parallel.pipeline_model_parallel_size == 1
    return case.architecture.share_embeddings_and_output_weights and one_stage


def _head(case: Case, sizes: Sizes, columns: int) -> float:
    """The head's peak, or the final norm's if that is larger: on a CPU torch's norm makes 5 tensors of h in backward.

    The head keeps a copy of its rows and the logits of `head.logits_memory_mb`, and makes the workspace of a slab and the
    float32 sum of the rows' gradients. The residual stream after the last layer, which the norm has kept, exists too.
    """
    head, rows = case.config.head, sizes.rows
    logit = _bytes_per_logit(case)
    width = min(columns, max(SLAB, int(head.workspace_mb * 2**20 / (rows * logit)) // SLAB * SLAB))
    kept = min((head.logits_memory_mb or 0) * 2**20, rows * columns * sizes.element)
    hidden = rows * sizes.hidden
    norm = sizes.hidden_bytes * (2 if case.machine.on_cpu else 1)
    passes = norm + hidden * sizes.element + kept + rows * width * logit + hidden * 4
    return max(passes, sizes.hidden_bytes * (6 if case.machine.on_cpu else 3))


def _bytes_per_logit(case: Case) -> int:
    """As `SlabPasses.bytes_per_logit`: the float32 logit, and its gradient unless that overwrites it; in plain torch one or
    two float32 temporaries besides."""
    head, bfloat16 = case.config.head, case.config.model.dtype == "bfloat16"
    if head.kernels == "triton" or (head.kernels == "auto" and not case.machine.on_cpu):
        return 6 if bfloat16 else 4
    return 14 if bfloat16 else 8


def _packs(case: Case, state: Stage, sizes: Sizes) -> Estimate:
    """Shards of the mini-step in use and of the next, and on the last stage the old log-probs of the iteration.

    A rank's share of the work is balanced within a few percent, and sequences are padded.
    """
    config = case.config
    parallel, steps = config.parallel, mini_steps(config)
    ranks = parallel.data_parallel_size * parallel.context_parallel_size
    tokens = case.workload().trained_tokens / ranks
    rows = tokens * sizes.rows / sizes.tokens
    log_probs = (2 if config.objective.kl_coefficient else 1) * 4 * rows if state.has_output else 0.0
    of_tokens = (TOKEN_BYTES + shard_route_bytes(case)) * tokens
    value = min(2, steps) / steps * (of_tokens + ROW_BYTES * rows) + log_probs
    return Estimate(value, 0.95 * value, 1.1 * value, sources=frozenset({"fields of a shard"}))


def _routes(case: Case, state: Stage) -> Estimate:
    """The routes of the iteration, which are replayed in its updates: those of the stage's layers and the rank's tokens."""
    parallel = case.config.parallel
    layers = sum(case.architecture.has_experts(layer) for chunk in state.layers for layer in chunk)
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    ranks = parallel.data_parallel_size * parallel.context_parallel_size * shards
    value = case.workload().trained_tokens / ranks * layers * route_bytes(case)
    return Estimate(value, 0.95 * value, 1.1 * value, sources=frozenset({"fields of a shard"}))


def _communication(case: Case, state: Stage, sizes: Sizes) -> float:
    """Megatron-Core's buffer for the gathered input of its own linear layers, kept for the complete run, and the pipeline's
    tensors in transit.

    1F1B: the gradient sent last. Interleaved: an activation and a gradient being sent, and those of the next pass, received
    in advance.
    """
    parallel = case.config.parallel
    buffers = 0.0
    if parallel.sequence_parallel and not uses_transformer_engine(case):
        buffers += sizes.tokens * sizes.hidden * sizes.element
    if parallel.virtual_pipeline_model_parallel_size:
        buffers += 4 * sizes.hidden_bytes
    elif not state.has_embedding:
        buffers += sizes.hidden_bytes
    return buffers
