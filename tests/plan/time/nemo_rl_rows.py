"""Public step times of NeMo-RL on H100, as cases of the planner.

Sources: docs/about/performance-summary.md of NeMo-RL v0.4 to v0.7 (one row: an average of five steps), its recipes in
examples/configs/recipes/llm/performance, and for v0.3 the table of phases in the announcement of 2025-08-20
(developer.nvidia.com, "Reinforcement Learning with NVIDIA NeMo-RL: Megatron-Core Support for Optimized Training Throughput").

From table and recipes: models, GPUs, lengths, batch sizes, layouts, recomputation, micro-batches of one full-length pack, the
larger packs of the log-prob passes, engines, their share of memory. Assumed, because neither states it:
- prompts of 100 tokens (OpenMathInstruct-2 with a chat template), and the length law's default spread,
- passes before the update: old log-probs and the reference (2); with `force_on_policy_ratio`, in v0.7's recipes with
  T-GBS = G-GBS, the reference alone (1),
- v0.3's engines: tensor parallel 4.

NeMo-RL does three things that the project's trainer does not; they are added here:
- weight gradients are written and then added to the buffer (`gradient_accumulation_fusion: false`): 8 bytes per parameter and
  micro-batch,
- the log-probs take float32 logits of the complete vocabulary: 14 bytes more per logit forward, 16 backward,
- with pipeline stages every pack is padded to its full length.

Left out: Nemotron-3-Nano-30B-A3B SWE (v0.6, 128 H100): Mamba layers cannot be expressed, and tools of the environment set its time.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.families.family import Architecture, Family
from megatron_fipo.families.qwen3 import QWEN3
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine import Machine
from megatron_fipo.plan.memory.state import BYTES_PER_ELEMENT
from megatron_fipo.plan.time.transfers import model_bytes
from megatron_fipo.plan.workload import Assumptions

PROMPT = 100
GROUP = 32
ENGINE_EXTRA = 4e9
"""Bytes of an engine's GPU besides weights and cache: activations, CUDA graphs, NCCL."""


def qwen3(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> Architecture:
    return Architecture(
        layers, hidden, ffn, heads, groups, 128, 151_936, 40_960, 1e-6, 1e6, False, qk_layernorm=True
    )


def llama(layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    """Its family's weights are those of Qwen3 but for norms of queries and keys."""
    return Architecture(layers, hidden, ffn, heads, 8, 128, 128_256, 131_072, 1e-5, 5e5, False)


QWEN3_MOE, A3B = read_model_config(Path(__file__).parents[3] / "examples/qwen3-30b-a3b")


def a22b() -> Architecture:
    """Qwen3-235B-A22B: other sizes than Qwen3-30B-A3B, and as many experts."""
    assert A3B.experts is not None
    return replace(
        A3B,
        num_layers=94,
        hidden_size=4096,
        ffn_hidden_size=12_288,
        num_attention_heads=64,
        experts=replace(A3B.experts, ffn_hidden_size=1536),
    )


MODELS: dict[str, tuple[Family, Architecture]] = {
    "32B": (QWEN3, qwen3(64, 5120, 25600, 64, 8)),
    "30B-A3B": (QWEN3_MOE, A3B),
    "235B-A22B": (QWEN3_MOE, a22b()),
    "Llama-3.1-8B": (QWEN3, llama(32, 4096, 14336, 32)),
    "Llama-3.1-70B": (QWEN3, llama(80, 8192, 28672, 64)),
}


@dataclass(frozen=True)
class Row:
    """A row of the tables."""

    version: str
    model: str
    gpus: int
    mode: str
    """`sync`: engines on the trainer's GPUs; `1-off` and `8-off`: on GPUs of their own, with weights that are that many updates old."""
    limit: int
    """Tokens of a sequence at most."""
    mean: int
    """Mean tokens of a sequence."""
    seconds: float
    """Measured, of a step."""
    layout: tuple[int, int, int, int]
    """Of training: tensor, context, expert, pipeline."""
    engine_tp: int
    update: int
    """Sequences per optimizer step (T-GBS)."""
    passes: int
    trainers: int = 0
    """GPUs that train; 0 for all."""
    share: float = 0.6
    """Of a GPU's memory, for an engine."""
    recompute: str = "none"
    log_prob_packs: int = 4
    """Size of a pack of the log-prob passes, in full-length sequences."""
    samples: int = 2048
    phases: tuple[float, float, float, float] | None = None
    """Measured seconds of training, log-probs, generation and refit, if published."""

    @property
    def name(self) -> str:
        length = "" if self.limit in (4096, 8192) else f", {self.limit:,} tokens"
        return f"v{self.version} {self.model} {self.mode} {self.gpus} GPUs{length}"


CALIBRATION = (
    Row(
        "0.3", "32B", 64, "sync", 4096, 3383, 213, (4, 1, 1, 2), 4, 512, 2, phases=(68, 40, 96, 7)
    ),
    Row(
        "0.3", "30B-A3B", 64, "sync", 4096, 3351, 167, (2, 1, 8, 1), 4, 512, 2,
        log_prob_packs=2, phases=(50, 23, 78, 12),
    ),
)  # fmt: skip
"""The rows that figures were fitted to: rates of products and attention under sustained load (log-probs of the first),
`decode_sequence` (generation of the first), the host time of a layer with experts (training of the second), refit of both."""

PHASES = (
    Row(
        "0.3",
        "Llama-3.1-8B",
        8,
        "sync",
        4096,
        895,
        112,
        (1, 1, 1, 1),
        1,
        512,
        2,
        log_prob_packs=2,
        phases=(28, 18, 58, 5),
    ),
    Row(
        "0.3",
        "Llama-3.1-70B",
        64,
        "sync",
        4096,
        498,
        147,
        (4, 1, 1, 4),
        4,
        512,
        2,
        log_prob_packs=2,
        phases=(28, 18, 84, 14),
    ),
)
"""Further rows of that table, which nothing was fitted to."""

_DENSE = ((4, 1, 1, 4), 4)
_EXPERTS = {"log_prob_packs": 2}
ROWS = (
    Row("0.7", "32B", 32, "sync", 4096, 3256, 323, *_DENSE, 2048, 1),
    Row("0.7", "32B", 64, "1-off", 4096, 3258, 161, *_DENSE, 2048, 1, 32, 0.8),
    Row("0.5", "32B", 32, "sync", 4096, 3251, 376, *_DENSE, 512, 2),
    Row("0.5", "32B", 64, "1-off", 4096, 3252, 200, *_DENSE, 512, 2, 32, 0.8),
    Row("0.4", "32B", 32, "sync", 4096, 3206, 393, *_DENSE, 512, 2),
    Row("0.4", "32B", 64, "1-off", 4096, 3207, 215, *_DENSE, 512, 2, 32, 0.8),
    Row("0.7", "30B-A3B", 32, "sync", 4096, 3198, 171, (1, 1, 8, 1), 2, 2048, 1, **_EXPERTS),
    Row("0.6", "30B-A3B", 32, "sync", 4096, 3203, 192, (1, 1, 8, 1), 2, 512, 2, **_EXPERTS),
    Row("0.5", "30B-A3B", 32, "sync", 4096, 3196, 198, (1, 1, 8, 1), 2, 512, 2, **_EXPERTS),
    Row("0.4", "30B-A3B", 32, "sync", 4096, 3154, 225, (2, 1, 8, 1), 4, 512, 2, **_EXPERTS),
    Row("0.7", "30B-A3B", 32, "1-off", 4096, 3203, 141, (1, 1, 8, 2), 2, 2048, 1, 16, 0.8, **_EXPERTS),
    Row("0.6", "30B-A3B", 32, "1-off", 4096, 3201, 152, (1, 1, 8, 2), 2, 512, 2, 16, 0.8, **_EXPERTS),
    Row("0.7", "30B-A3B", 192, "8-off", 4096, 3203, 33.1, (1, 1, 8, 1), 2, 512, 2, 128, 0.8, **_EXPERTS),
    Row("0.7", "30B-A3B", 32, "sync", 40960, 8170, 2022, (4, 8, 8, 1), 2, 512, 2, recompute="full"),
    Row(
        "0.7", "235B-A22B", 128, "sync", 8192, 5719, 367, (2, 2, 16, 8), 16, 512, 1,
        share=0.88, recompute="full", log_prob_packs=1, samples=512,
    ),
    Row(
        "0.6", "235B-A22B", 128, "sync", 8192, 5698, 395, (2, 2, 16, 8), 16, 512, 2,
        share=0.8, recompute="full", log_prob_packs=1, samples=512,
    ),
)  # fmt: skip


def case_of(row: Row, machine: Machine, packs: int = 1) -> Case:
    """The row's case, with micro-batches of `packs` full-length sequences."""
    family, architecture = MODELS[row.model]
    tensor, context, expert, pipeline = row.layout
    config = Config()
    config.model.recompute = row.recompute
    parallel, batch, rollout = config.parallel, config.batch, config.rollout
    parallel.tensor_model_parallel_size, parallel.sequence_parallel = tensor, tensor > 1
    parallel.context_parallel_size, parallel.pipeline_model_parallel_size = context, pipeline
    parallel.data_parallel_size = (row.trainers or row.gpus) // (tensor * context * pipeline)
    parallel.expert_model_parallel_size = expert
    parallel.overlap_communication = True
    config.head.logits_memory_mb = config.head.workspace_mb = 100_000
    batch.responses_per_prompt, batch.prompts_per_iteration = GROUP, row.samples // GROUP
    batch.mini_batch_prompts = row.update // GROUP
    batch.max_tokens_per_micro_batch = row.limit * packs // context
    rollout.engine, rollout.engine_tensor_parallel_size = "vllm", row.engine_tp
    rollout.num_engines = (row.gpus - row.trainers) // row.engine_tp
    rollout.placement = "separate" if row.trainers else "colocated"
    rollout.max_response_length, rollout.gpu_memory_share = row.limit - PROMPT, row.share
    rollout.prompts_in_flight = batch.prompts_per_iteration
    lengths = Assumptions(prompt_tokens=PROMPT, response_end=float(row.mean - PROMPT), informative=1.0)
    return Case(config, family, architecture, machine, lengths, row.passes)


def cache_tokens(case: Case) -> float:
    """Tokens that an engine's cache holds. NeMo-RL moves the trainer to the host meanwhile; `engine_memory` leaves it there."""
    architecture, rollout = case.architecture, case.config.rollout
    ways = rollout.engine_tensor_parallel_size
    free = rollout.gpu_memory_share * case.machine.device_bytes - model_bytes(case) / ways - ENGINE_EXTRA
    heads = min(ways, architecture.num_query_groups)
    element = BYTES_PER_ELEMENT[case.config.model.dtype]
    return free / (2 * architecture.num_layers * architecture.size("key") * element / heads)
