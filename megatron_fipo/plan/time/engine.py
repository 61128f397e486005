"""Time of one rollout engine: a decoding step, and the prefill of prompts.

A decoding step computes one token of every running sequence. On each device of the engine it reads the weights once and the
keys and values of all sequences, and multiplies; with many sequences the products take longer than reading their weights.
Each layer ends with two tensor-parallel all-reduces of the sequences' hidden states. A step has a fixed cost, and one per
sequence for sampling and scheduling.

Ignored: prefill in the same step (`prefill` has its time), speculative decoding, quantization, pipeline-parallel engines,
expert parallelism within an engine (its tensor ranks share every expert).
"""

from dataclasses import dataclass

from megatron_fipo.families.family import Architecture
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import Estimate, latest
from megatron_fipo.plan.experts import active_experts
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.collectives import engine_group
from megatron_fipo.plan.time.layer import products_of
from megatron_fipo.plan.time.weights import model_weights


@dataclass(frozen=True)
class EngineWeights:
    """Parameters that take part in a decoding step, over all devices of an engine."""

    dense: int
    """All but the experts: attention, norms, routers, output layer, feed-forward parts."""
    expert: int
    """One expert in every layer that has experts; 0 without experts."""


def engine_weights(case: Case) -> EngineWeights:
    """The embedding counts only if it is the output layer too: a row per sequence is nothing."""
    weights, architecture = model_weights(case), case.architecture
    ends = weights.ends - (0 if architecture.share_embeddings_and_output_weights else weights.embedding)
    return EngineWeights(ends + weights.dense, weights.expert)


def decode_step(case: Case, sequences: float, cache_tokens: float) -> Estimate:
    """Seconds of one decoding step of one engine with `sequences` running and `cache_tokens` tokens of theirs cached."""
    machine, architecture, group = case.machine, case.architecture, engine_group(case)
    element, devices = BYTES_PER_ELEMENT[case.config.model.dtype], group.size
    weights = engine_weights(case)
    size = (weights.dense + weights.expert * _touched(architecture, sequences)) * element / devices
    active = weights.dense + weights.expert * active_experts(architecture)
    reading = machine.decode_weights.seconds(size, "decode_weights")
    products = products_of(case, case.config.model.dtype).rate.seconds(
        2 * active * sequences / devices, f"products in {case.config.model.dtype}"
    )
    # Each key-value head is on one device, or on several if there are more devices than heads.
    heads = min(devices, architecture.num_query_groups)
    cached = 2 * architecture.num_layers * architecture.size("key") * element * cache_tokens / heads
    reduce = group.small_reduce(sequences * architecture.hidden_size * element)
    return (
        latest(reading, products)
        + machine.decode_cache.seconds(cached, "decode_cache")
        + reduce.scaled(2 * architecture.num_layers)
        + machine.decode_step.times(1, "decode_step")
        + machine.decode_sequence.times(sequences, "decode_sequence")
    )


def _touched(architecture: Architecture, sequences: float) -> float:
    """Experts of a layer that a step reads. Every sequence takes others: of 128, one sequence touches 8, and 32 sequences 112."""
    experts = architecture.experts
    if experts is None:
        return 0.0
    return experts.count * (1 - (1 - experts.per_token / experts.count) ** sequences)


def prefill(case: Case, tokens: float) -> Estimate:
    """Seconds in which one engine computes `tokens` tokens of prompts, or of responses whose cache was lost.

    Ignored: attention among them, which is small for prompts of some hundred tokens.
    """
    architecture, group = case.architecture, engine_group(case)
    weights, vocabulary = engine_weights(case), architecture.size("vocab") * architecture.size("hidden")
    active = weights.dense - vocabulary + weights.expert * active_experts(architecture)
    element = BYTES_PER_ELEMENT[case.config.model.dtype]
    reduce = group.reduce(tokens * architecture.hidden_size * element).scaled(2 * architecture.num_layers)
    return case.machine.prefill.seconds(2 * active * tokens / group.size, "prefill") + reduce
