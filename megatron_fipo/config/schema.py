"""Every setting of a run, with its meaning beside it.

The dataclasses below are the documentation: one per section, each field followed by its meaning. Ranges and choices are
on the fields (`fields.py`). Names of parallel settings are Megatron-Core's own. `megatron-fipo config` prints all of it.

`REQUIRED` (`???`) marks a required value. Paths are relative to the current directory, not to the YAML file.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.config.task_schema import (
    LEAST_TEMPERATURE,
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    RewardConfig,
)
from megatron_fipo.fields import REQUIRED, choice, file_path, free_values, hook, number, variables
from megatron_fipo.objective.config import ObjectiveConfig


@dataclass
class RouterConfig:
    """The router of a mixture of experts. Nothing here has an effect on a model without experts."""

    replay: str = choice("old_log_probs", "rollout", "none")
    """Experts of each token in the updates of an iteration: those that the router chose in the pass of the old log-probs,
    those that the rollout engine reported (vllm, or an engine of yours), or a new choice in every pass. Without replay the
    log-ratio need not be 0 in the first mini-step, and FutureKL sums the difference over later tokens."""
    trainable: bool = False
    """Also train the router. Its choice then changes between iterations only, unless replay is `none`."""
    dtype: str = choice("float32", "float64")
    """Dtype of the router's product and softmax, whatever model.dtype is."""
    load_balancing: float = number(0.0, least=0)
    """Coefficient of the auxiliary loss that spreads tokens over experts; 0 for none. It pulls the policy away from the
    objective, and needs trainable=true."""


@dataclass
class ModelConfig:
    """The model that is trained."""

    path: str = file_path(REQUIRED)
    """Folder in Hugging Face format: config.json, safetensors, tokenizer. Training starts from these weights."""
    dtype: str = choice("bfloat16", "float32")
    """Dtype of parameters and activations. Gradients, master weights and everything per token are float32."""
    fp8: str = choice("none", "hybrid", "e4m3")
    """FP8 matrix products in the layers (Transformer Engine, GPUs of compute capability 8.9 and above;
    `docs/precision.md`). `hybrid` is E4M3 in forward and E5M2 for gradients, `e4m3` uses E4M3 for both."""
    fp8_recipe: str = choice("blockwise", "tensorwise", "delayed")
    """Source of the FP8 scales: each block of 128 values (`blockwise`, needs Hopper and CUDA 12.9), each tensor
    (`tensorwise`), or the tensors of earlier micro-batches (`delayed`; the first mini-step then differs from the old
    log-probs)."""
    fp8_param_gather: bool = False
    """Also keep the layers' matrices in FP8 between steps: half the bytes to gather after each. Not with `delayed`."""
    layer_spec: str = choice("auto", "portable", "transformer_engine")
    """Modules of a layer. `auto` takes Transformer Engine for bfloat16 if it is installed, else the portable modules, and
    logs which."""
    recompute: str = choice("none", "selective", "full")
    """Activation recomputation: `selective` recomputes core attention, `full` complete layers."""
    router: RouterConfig = field(default_factory=RouterConfig)
    trust_remote_code: bool = False
    """Let Hugging Face run code from the model folder."""

    @property
    def token_multiple(self) -> int:
        """The number of tokens that a layer processes on one rank is a multiple of this."""
        if self.fp8 == "none":
            return 1
        return 128 if self.fp8_recipe == "blockwise" else 16


@dataclass
class ParallelConfig:
    """Parallel layout of the trainer's ranks. World size = tensor × pipeline × context × data."""

    tensor_model_parallel_size: int = number(1, least=1)
    """Ranks that share each matrix. Must divide attention heads, key-value groups and feed-forward width."""
    sequence_parallel: bool = False
    """Also shard norms and residuals over the tensor-parallel ranks (less memory; needs tensor_model_parallel_size > 1)."""
    pipeline_model_parallel_size: int = number(1, least=1)
    """Ranks that share the stack of layers."""
    virtual_pipeline_model_parallel_size: int | None = number(None, least=2)
    """Model chunks per pipeline rank (interleaved schedule); null for one."""
    context_parallel_size: int = number(1, least=1)
    """Ranks that share each sequence."""
    data_parallel_size: int = number(1, least=1)
    """Replicas of all of the above."""
    expert_model_parallel_size: int = number(1, least=1)
    """Ranks that share the experts of a layer, each some of them completely. Taken from the ranks of a pipeline stage, so
    the world size does not change."""
    expert_tensor_parallel_size: int = number(1, least=1)
    """Ranks that share each matrix of an expert, as tensor_model_parallel_size does outside experts."""
    overlap_communication: bool = False
    """Overlap gradient reduction with the backward pass."""

    @property
    def world_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage: tensor × context × data, or expert-tensor × expert × expert-data."""
        return self.world_size // self.pipeline_model_parallel_size

    @property
    def length_multiple(self) -> int:
        """Each sequence is padded to a multiple of this, so that it divides into 2 × cp chunks and over
        sequence-parallel ranks."""
        chunks = 2 if self.context_parallel_size > 1 else 1
        return self.context_parallel_size * math.lcm(chunks, self._sequence_shards)

    def pack_multiple(self, token_multiple: int) -> int:
        """Each micro-batch is padded to a multiple of this, so that every rank holds a multiple of `token_multiple` tokens.

        A multiple of `length_multiple`, and no more than that for `token_multiple` 1.
        """
        return math.lcm(
            self.length_multiple, self.context_parallel_size * self._sequence_shards * token_multiple
        )

    @property
    def _sequence_shards(self) -> int:
        return self.tensor_model_parallel_size if self.sequence_parallel else 1


@dataclass
class HeadConfig:
    """The output layer, which turns hidden states of response tokens into log-probs and entropy, and the loss after it."""

    kernels: str = choice("auto", "torch", "triton")
    """Kernels of everything but matrix products: `auto` takes Triton if it runs here, else plain torch with the same
    numbers."""
    workspace_mb: int = number(384, least=1)
    """Memory for logits at one time: the vocabulary is processed in slabs that fit. On a GPU a bfloat16 logit takes 6
    bytes (float32 and its gradient). More slabs are slower: each reads and writes the sum of the hidden states'
    gradients."""
    logits_memory_mb: int | None = number(None, least=0)
    """Keep logits (in the model's dtype) for backward while they fit this budget per micro-batch; 0 recomputes them, which
    takes a third more matrix products. null: half of the GPU memory that the first two steps left free (metric memory/logits_gib);
    0 on a CPU and with `deterministic`."""


@dataclass
class BatchConfig:
    """Batch sizes per iteration, per optimizer step and per forward pass."""

    prompts_per_iteration: int = number(512, least=1)
    """Groups trained on per iteration, after dynamic sampling."""
    responses_per_prompt: int = number(16, least=2)
    """Group size; advantages compare the responses to one prompt."""
    mini_batch_prompts: int = number(64, least=1)
    """Groups per optimizer step; prompts_per_iteration / mini_batch_prompts steps per iteration."""
    max_tokens_per_micro_batch: int = number(22528, least=1)
    """Padded tokens that one rank processes at one time. A micro-batch has context_parallel_size times as many."""


@dataclass
class OptimizerSettings:
    """AdamW, with Megatron-Core's distributed optimizer."""

    lr: float = number(1e-6, above=0)
    """Constant learning rate after the warm-up (AdamW)."""
    warmup_iterations: int = number(10, least=0)
    """Iterations over which the rate rises linearly from 0; it changes once per iteration."""
    weight_decay: float = number(0.1, least=0)
    """Decoupled weight decay, not applied to norms and biases."""
    adam_beta1: float = number(0.9, least=0, below=1)
    """Decay of the first moment."""
    adam_beta2: float = number(0.999, least=0, below=1)
    """Decay of the second moment."""
    adam_eps: float = number(1e-8, above=0)
    """Added to the root of the second moment."""
    clip_grad: float = number(1.0, least=0)
    """Largest global gradient norm; 0 for none."""
    distributed: bool = True
    """Megatron's distributed optimizer: state sharded over data and context parallel ranks."""
    state_dtype: str = choice("float32", "bfloat16")
    """Dtype of the two moments; `bfloat16` needs Transformer Engine's Adam. Master weights and checkpoints stay float32."""
    cpu_offload: float = number(0.0, least=0, most=1)
    """Share of master weights and moments that is kept and updated in host memory (needs a GPU and
    model.dtype=bfloat16)."""


@dataclass
class RolloutConfig:
    """Sampling of responses, and dynamic sampling of groups."""

    engine: str = hook("local", "vllm")
    """`vllm` generates with vLLM; `local` with transformers, for small models and machines without vLLM."""
    num_engines: int = number(1, least=1)
    """Engine replicas; requests are spread over them."""
    engine_tensor_parallel_size: int = number(1, least=1)
    """Ranks that share one engine's model (vllm only). Each takes one GPU if there are GPUs."""
    placement: str = choice("auto", "separate", "colocated")
    """`separate`: engines have their own GPUs. `colocated`: engines share the trainer's GPUs; they sleep and release their
    memory while the trainer works (vllm and local, mode=synchronous only). `auto`: `colocated` if there are fewer GPUs than
    ranks and engines need, but one for each rank, and engines can share them; else `separate`."""
    gpu_memory_share: float = number(0.85, above=0, most=1)
    """Share of a GPU's memory for an engine's weights and KV cache (vllm on GPUs only)."""
    mode: str = choice("synchronous", "one_step_off", "fully_asynchronous")
    """`synchronous` samples, then trains. `one_step_off` samples the next iteration while this one trains; each iteration
    uses one weight version. `fully_asynchronous` never stops sampling; new weights also apply to unfinished responses."""
    unfinished: str = choice("drop", "continue")
    """What happens to responses that are unfinished when an iteration has its groups. `drop`: an iteration takes the first
    informative groups in prompt order, independent of timing; prompts started beyond them are dropped. `continue` keeps
    `prompts_in_flight` prompts running; unfinished responses continue under the next weights."""
    prompts_in_flight: int = number(1024, least=1)
    """Prompts at the engines at one time. With `drop` this many are started at once: batch.prompts_per_iteration wastes
    nothing and waits for replacements of uninformative groups; prompts_per_iteration / (share of informative groups) is
    faster and wastes a few percent."""
    max_prompts: int = number(20480, least=1)
    """Prompts that dynamic sampling may start for one iteration before it continues with the groups it has."""
    filter_by: str = choice("accuracy", "reward")
    """What must differ within a group for training to use it. `reward`, before the overlong penalty, is for rewards that have
    other values than right and wrong; a reward function that returns a number alone is accurate if it is above 0."""
    max_staleness: int = number(1, least=0)
    """Largest number of weight versions between a group's oldest token and its update; older groups are dropped. With
    `continue`, 2 or 3 avoid dropping long responses more often than short ones. In `fully_asynchronous` it also limits
    how many iterations are sampled in advance."""
    temperature: float = number(1.0, least=LEAST_TEMPERATURE)
    """Sampling temperature. The head divides logits by the same number. vLLM raises lower ones to 0.01."""
    top_p: float = number(1.0, above=0, most=1)
    """Nucleus truncation while sampling."""
    top_k: int = number(0, least=0)
    """Number of most likely tokens to sample from; 0 for all."""
    min_p: float = number(0.0, least=0, most=1)
    """Least probability of a sampled token, as a share of the most likely token's; 0 for no truncation."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, also in evaluation: `stop: ["</answer>"]`. The response includes them; its finish reason
    is `stop`."""
    vllm: dict[str, Any] = free_values()
    """Arguments of vLLM's engine (`AsyncEngineArgs`) for rollout.engine=vllm: `vllm: {max_num_seqs: 256, quantization: fp8}`.
    docs/rollout-engines.md lists those that follow from other settings and are refused here."""
    max_prompt_length: int = number(2048, least=1)
    """Longest prompt in tokens; longer ones are refused when the dataset is read."""
    max_response_length: int = number(20480, least=1)
    """Longest response in tokens; generation stops there with finish reason `length`."""
    max_retries: int = number(2, least=0)
    """Times a failed request is sent again before its group is dropped and counted."""
    timeout_s: float = number(3600.0, above=0)
    """Seconds an engine may take to load or to take new weights."""
    stall_timeout_s: float = number(600.0, above=0)
    """Seconds an engine may hold requests without computing a token before it counts as hung. A call itself may take as long
    as its tokens come."""
    health_timeout_s: float = number(60.0, above=0)
    """Seconds an engine may leave a health probe unanswered before it counts as hung."""
    max_restarts: int = number(3, least=0)
    """Times an engine is restarted after it died, hung or sent malformed replies; then the others continue without it. An
    engine that has given 1,000 responses since its last restart has all of them again."""
    weight_bucket_mb: int = number(256, least=1)
    """Size of the buckets in which weights are sent to the engines."""
    check_weight_sync: int = number(1, least=0)
    """Weight updates between comparisons of a checksum of each tensor on both sides; an engine that differs is reported and
    restarted. 0 for never."""
    dump_every: int = number(0, least=0)
    """Iterations between dumps of the trained trajectories to run_dir/rollouts, for `train --replay`; 0 for none."""

    def __post_init__(self) -> None:
        """Raises ValueError for an empty stop string."""
        if "" in self.stop:
            raise ValueError("stop must not contain an empty string, which every response contains")

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.max_prompt_length + self.max_response_length

    @property
    def colocated(self) -> bool:
        """Whether engines share the trainer's GPUs. RuntimeError for `auto`, which `placement.with_placement` replaces."""
        if self.placement == "auto":
            raise RuntimeError("rollout.placement=auto was read before it was replaced by a placement")
        return self.placement == "colocated"


@dataclass
class CheckpointConfig:
    """When the run's state is saved, and which checkpoints are kept. The newest complete one always is."""

    every: int = number(5, least=0)
    """Iterations between checkpoints; 0 saves only at the end and on interruption."""
    asynchronous: bool = True
    """Write in the background while training continues; a writer that fails stops the run with its reason."""
    keep_last: int = number(1, least=1)
    """Number of newest checkpoints to keep."""
    keep_best: int = number(0, least=0)
    """Number of checkpoints with the best held-out accuracy (avg@k) to keep in addition."""
    keep_every: int = number(0, least=0)
    """Also keep each checkpoint whose iteration is a multiple of this; 0 for none."""


@dataclass
class RecoveryConfig:
    """What a run does when a trainer rank, its node or a checkpoint writer is lost: it starts the ranks again and resumes from
    the last checkpoint, while engines and scorers stay."""

    max_restarts: int = number(3, least=0)
    """Times the ranks are started again without a new checkpoint in between; then the command ends with exit code 86."""
    placement_timeout_s: float = number(600.0, above=0)
    """Seconds to wait for other resources after a node was lost."""
    stall_timeout_s: float = number(600.0, above=0)
    """Seconds in which a working trainer may finish no micro-batch, tensor or block of a file on any rank, or in which a rank
    may not answer at all, before it counts as lost. Must be longer than the longest micro-batch, kernel compilation and
    import included."""


@dataclass
class TrackingConfig:
    """Where metrics go besides the console and the run directory."""

    wandb: str = choice("offline", "online", "disabled")
    """Weights & Biases mode."""
    wandb_project: str = "megatron-fipo"
    """Project name there."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


@dataclass
class Config:
    """Reinforcement learning: `megatron-fipo train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    run_dir: str = file_path(REQUIRED)
    """Folder of the run's state, metrics, report and model. An existing run of the same config is resumed."""
    iterations: int = number(500, least=1)
    """Iterations of rollout and update."""
    seed: int = number(1, least=0)
    """Seed of data order, sampling and initialization."""
    deterministic: bool = False
    """The same seed gives the same bits in every run of the same parallel layout, at some cost in speed; also after engines
    died (within max_retries) or the run was resumed. Not with rollout.mode=fully_asynchronous or
    rollout.unfinished=continue, which depend on timing."""
    max_walltime_minutes: float | None = number(None, above=0)
    """Save, stop and exit with code 85 at the first safe point after this long; null for no limit."""
    ray_address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""
    env: dict[str, str] = variables()
    """Environment variables of trainer ranks, engines and scorers, on all nodes: `env: {NCCL_DEBUG: INFO}`, or
    env.NCCL_DEBUG=INFO; null removes one. Not for secrets."""
    placement_timeout_s: float = number(600.0, above=0)
    """Seconds to wait until the Ray cluster has the resources of the ranks and of the engines: nodes may still join it."""
