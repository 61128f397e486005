"""Memory of a rollout engine's GPUs: weights, what vLLM needs besides, and the tokens that its KV cache holds.

vLLM takes `rollout.gpu_memory_share` of the device for everything of its process: it loads the weights, runs the largest
batch once to see what activations and libraries take, and gives the rest to the KV cache.

    weights   embedding and output layer, both sharded over the vocabulary; matrices sharded as in Megatron-Core; with more
              ranks than key-value groups, the key and value matrices replicated
    other     CUDA context and libraries, activations of a prefill of `BATCHED_TOKENS`, and the sampler's float32 logits of
              all sequences; not measured on a GPU
    cache     2 (key and value) · layers · groups of the rank · head size elements per token

`local` engines have no such limit; for them the numbers say what would fit into the same share.

Example, Qwen2.5-32B on 4 ranks of 80 GiB at a share of 0.85: 68 GiB − 15.3 of weights − 6.6 other = 46 GiB, at 65,536 bytes
per token 0.75 million tokens.
"""

from dataclasses import dataclass

from megatron_fipo.config import RolloutConfig
from megatron_fipo.config.vllm_arguments import kv_element_bytes
from megatron_fipo.families.family import Architecture, Layout, Weight
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import NOTHING, Estimate, total
from megatron_fipo.plan.experts import expert_count
from megatron_fipo.plan.layout import distinct_weights
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.memory.trainer import trainer_memory

MAX_SEQUENCES = 1024
"""Sequences that an engine runs at one time without `rollout.vllm.max_num_seqs`: 16 requests × 64 calls of `VLLMEngine`."""
BATCHED_TOKENS = 8192
"""vLLM's default `max_num_batched_tokens`: tokens of one forward pass."""
USED_SHARE = 0.9
"""Of the KV cache: the driver admits no more sequences than fill this share (`driver/rollout/kv_budget.py`)."""
LOGIT_BYTES = 12
"""Of a token's logit while sampling: float32, its log-probability, and a copy that is sorted for top-p."""
SMALL = "memory of an engine besides weights and KV cache"
STAYS = ("weights", "gradients", "optimizer", "reference model", "CUDA and libraries")
"""Parts of a trainer rank that stay on the device while a colocated engine samples."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes are of one device of one engine."""

    weights: float
    other: Estimate
    trainer: Estimate
    """What a trainer rank keeps on the device beside a colocated engine; nothing if separate."""
    cache_bytes_per_token: float
    cache_tokens: Estimate
    """Of one engine: tokens whose keys and values fit. 0 if the weights leave no space."""
    max_sequences: int = MAX_SEQUENCES

    def sequences(self, mean_tokens: float) -> Estimate:
        """Sequences that run at one time if each holds `mean_tokens` on average: as the driver admits, up to vLLM's limit."""
        found = self.cache_tokens.scaled(USED_SHARE / mean_tokens)
        return Estimate(
            min(self.max_sequences, found.value),
            min(self.max_sequences, found.low),
            min(self.max_sequences, found.high),
            found.sources,
            found.not_calibrated,
        )


def engine_memory(
    case: Case, weight_bytes_per_element: int | None = None, cache_bytes_per_element: int | None = None
) -> EngineMemory:
    """Memory of an engine. The element sizes default to those of the settings (model.dtype, rollout.vllm); 1 is FP8.

    A colocated engine gets no more than the trainer leaves: the share, or the device without what the trainer keeps. vLLM
    refuses to start if its share is not free, so `rollout.gpu_memory_share` must not exceed that.
    """
    element = BYTES_PER_ELEMENT[case.config.model.dtype]
    ranks = case.config.rollout.engine_tensor_parallel_size
    architecture = case.architecture
    groups = -(-architecture.num_query_groups // ranks)
    per_token = (
        2.0
        * architecture.num_layers
        * groups
        * architecture.kv_channels
        * (cache_bytes_per_element or kv_element_bytes(case.config.rollout.vllm, element))
    )
    weights = _weights(case, ranks) * (weight_bytes_per_element or element)
    other, trainer = _other(case, element), _trainer(case)
    device = case.machine.device_bytes
    budget = case.config.rollout.gpu_memory_share * device

    def tokens(other_bytes: float, trainer_bytes: float) -> float:
        return max(0.0, (min(budget, device - trainer_bytes) - weights - other_bytes) / per_token)

    return EngineMemory(
        weights=weights,
        other=other,
        trainer=trainer,
        cache_bytes_per_token=per_token,
        max_sequences=max_sequences(case.config.rollout),
        cache_tokens=Estimate(
            tokens(other.value, trainer.value),
            tokens(other.high, trainer.high),
            tokens(other.low, trainer.low),
            other.sources | trainer.sources,
            other.not_calibrated | trainer.not_calibrated,
        ),
    )


def max_sequences(rollout: RolloutConfig) -> int:
    """Sequences that an engine runs at one time."""
    return rollout.vllm.get("max_num_seqs", MAX_SEQUENCES)


def _weights(case: Case, ranks: int) -> float:
    """Parameters on a rank of the engine. vLLM shards the matrices of every expert over the engine's ranks."""
    count = expert_count(case.architecture)
    return sum(
        _on_rank(case, weight, ranks) * (1 if weight.expert is None else count)
        for weight in distinct_weights(case.family, case.architecture)
    )


def _on_rank(case: Case, weight: Weight, ranks: int) -> float:
    if weight.layout is Layout.REPLICATED:
        return weight.parameters
    if weight.layout is Layout.QKV:
        heads, groups = case.architecture.num_attention_heads, case.architecture.num_query_groups
        held = heads / ranks + 2 * -(-groups // ranks)
        return weight.parameters * held / (heads + 2 * groups)
    return weight.parameters / ranks


def _other(case: Case, element: int) -> Estimate:
    """CUDA and libraries, the activations of a prefill (gate and up, their product, and four of the residual stream; the output
    of each expert of a token), and the sampler's logits."""
    architecture, ranks = case.architecture, case.config.rollout.engine_tensor_parallel_size
    activations = (
        BATCHED_TOKENS * element * (_feed_forward(architecture, ranks) + 4 * architecture.hidden_size)
    )
    logits = max_sequences(case.config.rollout) * architecture.vocab_size * LOGIT_BYTES
    made = Estimate(
        activations + logits,
        0.5 * (activations + logits),
        1.5 * (activations + logits),
        not_calibrated=frozenset({SMALL}),
    )
    return made + case.machine.reserved_bytes.times(1.0, SMALL)


def _feed_forward(architecture: Architecture, ranks: int) -> float:
    """Elements per token."""
    dense, experts = 3 * architecture.ffn_hidden_size / ranks, architecture.experts
    if experts is None:
        return dense
    routed = experts.per_token * (3 * experts.ffn_hidden_size / ranks + architecture.hidden_size)
    return max(routed, dense) if experts.dense_layers else routed


def _trainer(case: Case) -> Estimate:
    """The largest of the stages."""
    if not case.colocated:
        return NOTHING
    stages = (
        trainer_memory(case, stage).parts
        for stage in range(case.config.parallel.pipeline_model_parallel_size)
    )
    kept = [total(part for name, part in parts.items() if name in STAYS) for parts in stages]
    return max(kept, key=lambda estimate: estimate.value)
