"""What is measured: products, packs and batches of the run at hand. Pure arithmetic.

What the planner multiplies with the figures is counted by the planner's own functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_fipo.config import Config
from megatron_fipo.families.family import Architecture
from megatron_fipo.plan.case import DEFAULT_SHARE_OF_LIMIT, Case
from megatron_fipo.plan.layout import vocabulary_columns
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.engine import engine_weights
from megatron_fipo.plan.time.layer import layer_products
from megatron_fipo.plan.time.packs import Packs

MOST_ON_CPU = 3.0e9
"""Operations of a product or a pass on a CPU: some 50 ms of a thread."""
LEAST_TOKENS = 64
BATCHES = (1.0, 0.25, 0.0625)
"""Shares of an engine's largest batch that are decoded."""
DECODED_TOKENS = 32
"""Per response, at most."""


@dataclass(frozen=True)
class Weight:
    """A matrix of one tensor-parallel rank: a product is [tokens, inputs] × [inputs, outputs]."""

    inputs: int
    outputs: int

    @property
    def side(self) -> int:
        """The shorter side."""
        return min(self.inputs, self.outputs)

    def operations(self, tokens: int) -> float:
        """Of the forward product; the two of the backward pass take as many each."""
        return 2.0 * tokens * self.inputs * self.outputs

    def tokens_within(self, tokens: int, most: float) -> int:
        """At most `tokens`, and fewer if their product takes more than `most` operations; not below `LEAST_TOKENS`."""
        return min(tokens, max(LEAST_TOKENS, int(most / self.operations(1))))


@dataclass(frozen=True)
class Batch:
    """What an engine decodes."""

    sequences: int
    prompt_tokens: int
    new_tokens: int


def sliced(architecture: Architecture, tensor_parallel: int) -> Architecture:
    """One tensor-parallel rank's part as an architecture of its own, of two layers."""
    return replace(
        architecture,
        num_layers=2,
        num_attention_heads=architecture.num_attention_heads // tensor_parallel,
        num_query_groups=architecture.num_query_groups // tensor_parallel,
        ffn_hidden_size=architecture.ffn_hidden_size // tensor_parallel,
    )


def layer_weights(case: Case) -> list[Weight]:
    """The matrices of a layer on one rank."""
    return [Weight(product.k, product.n) for product in layer_products(case)]


def head_weight(case: Case) -> Weight:
    """The output layer on one rank."""
    return Weight(case.architecture.hidden_size, vocabulary_columns(case))


def measured_weights(case: Case) -> list[Weight]:
    """Those of the run, and with twice and four times the tensor-parallel ranks: sides of several lengths tell the `half`."""
    found: list[Weight] = []
    for size in tensor_parallel_sizes(case):
        other = case.changed(parallel={"tensor_model_parallel_size": size})
        found += [*layer_weights(other), head_weight(other)]
    return list(dict.fromkeys(found))


def tensor_parallel_sizes(case: Case) -> list[int]:
    """The size of the run, and twice and four times that if they divide the model."""
    size, model = case.config.parallel.tensor_model_parallel_size, case.architecture
    counts = model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size
    larger = [size * factor for factor in (2, 4)]
    return [size, *(size for size in larger if all(count % size == 0 for count in counts))]


def typical_length(config: Config) -> int:
    """Tokens of a prompt and a response: half of the longest prompt, and the response that the planner assumes."""
    rollout = config.rollout
    return max(2, round(rollout.max_prompt_length / 2 + DEFAULT_SHARE_OF_LIMIT * rollout.max_response_length))


def micro_batch_tokens(config: Config) -> int:
    """Tokens of a typical micro-batch on one rank: its budget, or a mini-batch that does not fill it."""
    batch, parallel = config.batch, config.parallel
    ranks = parallel.data_parallel_size * parallel.context_parallel_size
    tokens = batch.mini_batch_prompts * batch.responses_per_prompt * typical_length(config) / ranks
    return max(1, min(batch.max_tokens_per_micro_batch, round(tokens)))


def packs(case: Case) -> list[tuple[int, ...]]:
    """Lengths of the sequences of two packs: typical ones, and the longest that fit."""
    rollout, tokens = case.config.rollout, micro_batch_tokens(case.config)
    most = min(tokens, case.architecture.max_position_embeddings)
    longest = rollout.longest_sequence
    lengths = [min(length, most) for length in (typical_length(case.config), longest)]
    return [(length,) * max(1, tokens // length) for length in dict.fromkeys(lengths)]


def pairs(lengths: Sequence[int]) -> float:
    """Pairs of a query and a key that it sees, as the planner counts them: L²/2 of a sequence."""
    return sum(length * length / 2 for length in lengths)


def attention_operations(architecture: Architecture, lengths: Sequence[int]) -> float:
    """Of one layer forward: scores and weighted values. The backward pass counts twice."""
    return 4.0 * architecture.size("query") * pairs(lengths)


def shortened(architecture: Architecture, lengths: tuple[int, ...], most: float) -> tuple[int, ...]:
    """A pack of at most `most` operations of attention: fewer sequences, then a shorter one."""
    while len(lengths) > 1 and attention_operations(architecture, lengths) > most:
        lengths = lengths[: len(lengths) // 2]
    while lengths[0] > LEAST_TOKENS and attention_operations(architecture, lengths) > most:
        lengths = (lengths[0] // 2,)
    return lengths


def as_packs(lengths: Sequence[int]) -> Packs:
    """A pack as the planner describes it."""
    return Packs(count=1, tokens=float(sum(lengths)), pairs=pairs(lengths), rows=float(sum(lengths)))


def batches(config: Config, most_sequences: int) -> list[Batch]:
    """What an engine decodes: all pairs of three batch sizes and two lengths of prompts."""
    rollout = config.rollout
    requests = rollout.prompts_in_flight * config.batch.responses_per_prompt // rollout.num_engines
    largest = max(1, min(most_sequences, requests))
    new = min(DECODED_TOKENS, rollout.max_response_length)
    longest = rollout.longest_sequence - new
    prompts = {max(1, longest // 8), max(1, longest // 2)}
    sizes = {max(1, round(share * largest)) for share in BATCHES}
    return [Batch(size, prompt, new) for size in sorted(sizes) for prompt in sorted(prompts)]


def engine_weight_bytes(case: Case) -> float:
    """Bytes of weights that a decoding step reads on one device."""
    ranks = case.config.rollout.engine_tensor_parallel_size
    return engine_weights(case).dense * BYTES_PER_ELEMENT[case.config.model.dtype] / ranks


def decode_operations(case: Case) -> float:
    """Of the products of one sequence in a decoding step, on one device."""
    return 2.0 * engine_weights(case).dense / case.config.rollout.engine_tensor_parallel_size


def prefill_operations(case: Case, tokens: float) -> float:
    """Of prompts, on one device: all but the output layer."""
    vocabulary = case.architecture.size("vocab") * case.architecture.size("hidden")
    active = engine_weights(case).dense - vocabulary
    return 2.0 * active * tokens / case.config.rollout.engine_tensor_parallel_size


def cache_token_bytes(case: Case) -> float:
    """Bytes of keys and values of one token on one device."""
    model = case.architecture
    heads = min(case.config.rollout.engine_tensor_parallel_size, model.num_query_groups)
    return 2.0 * model.num_layers * model.size("key") * BYTES_PER_ELEMENT[case.config.model.dtype] / heads
