"""Refuse combinations that cannot work, before anything starts. Pure: facts about model and machine are arguments."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.config.gpu_rules import (
    Accelerators,
    check_accelerators,
    check_adam,
    check_fp8_split,
    check_layers,
    check_precision,
)
from megatron_fipo.config.load import leaves
from megatron_fipo.config.schema import Config, ObjectiveSettings, ParallelConfig, RolloutConfig, SftConfig
from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from megatron_fipo.families.family import Architecture

AT_LEAST_ONE = {
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.data_parallel_size",
    "head.workspace_mb",
    "batch.prompts_per_iteration",
    "batch.mini_batch_prompts",
    "batch.max_tokens_per_micro_batch",
    "rollout.num_engines",
    "rollout.max_prompt_length",
    "rollout.max_response_length",
    "rollout.engine_tensor_parallel_size",
    "rollout.prompts_in_flight",
    "rollout.max_prompts",
    "rollout.weight_bucket_mb",
    "data.train_size",
    "data.evaluation_size",
    "checkpoint.keep_last",
    "evaluation.samples_per_problem",
    "iterations",
    "steps",
    "tokens_per_step",
}
AT_LEAST_ZERO = {
    "head.logits_memory_mb",
    "objective.kl_coefficient",
    "objective.entropy_coefficient",
    "optimizer.warmup_iterations",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "rollout.max_staleness",
    "rollout.max_retries",
    "reward.overlong_buffer",
    "reward.overlong_factor",
    "evaluation.every",
    "evaluation.temperature",
    "checkpoint.every",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "rollout.max_restarts",
    "rollout.check_weight_sync",
    "rollout.dump_every",
    "seed",
}
ABOVE_ZERO = {
    "objective.half_life",
    "objective.safety_threshold",
    "objective.clip_high",
    "optimizer.lr",
    "optimizer.adam_eps",
    "rollout.temperature",
    "rollout.timeout_s",
    "rollout.health_timeout_s",
    "objective.correction_cap",
    "max_walltime_minutes",
}
UP_TO_ONE = {"optimizer.cpu_offload"}
"""At least 0 and at most 1."""
SHARES = {"rollout.gpu_memory_share", "rollout.top_p", "evaluation.top_p"}
"""Above 0 and at most 1."""
BELOW_ONE = {"objective.clip_low", "optimizer.adam_beta1", "optimizer.adam_beta2"}
"""At least 0 and below 1."""


@dataclass(frozen=True)
class Machine:
    """What ranks can run on: the GPUs or, where there is none, the CPU cores."""

    cpus: int
    gpus: int
    accelerators: Accelerators | None = None
    """None where they are not known, on a Ray cluster of other machines; its ranks look for themselves."""


def validate(
    config: Config, architecture: "Architecture | None" = None, machine: Machine | None = None
) -> None:
    """Check a training configuration; raises UserError naming the first key at fault and the mend.

    Without `architecture` the checks against the model are left out, without `machine` those against cores and GPUs.
    """
    _check_ranges(config)
    _check_parallel(config.parallel, architecture)
    if machine is not None:
        _check_machine(config.parallel, config.model.layer_spec, machine, config.rollout)
    _check_precision(config, architecture, machine)
    if config.parallel.overlap_communication and not config.optimizer.distributed:
        raise UserError("parallel.overlap_communication needs optimizer.distributed=true")
    _check_batch(config)
    _check_objective(config.objective)
    _check_rollout(config, architecture)
    if config.reward.overlong_buffer >= config.rollout.max_response_length:
        raise UserError(
            f"reward.overlong_buffer={config.reward.overlong_buffer} has to be below "
            f"rollout.max_response_length={config.rollout.max_response_length}; 0 turns the penalty off"
        )
    _check_data(config, training=True)
    _check_positions(config.rollout, architecture)


def validate_evaluation(config: Config, architecture: "Architecture | None" = None) -> None:
    """Check what measuring a model needs; the settings of training are not looked at. Raises UserError."""
    _check_ranges(config)
    _check_data(config, training=False)
    _check_positions(config.rollout, architecture)


def validate_sft(
    config: SftConfig, architecture: "Architecture | None" = None, machine: Machine | None = None
) -> None:
    """Check a supervised configuration; arguments as in `validate`. Raises UserError."""
    _check_ranges(config)
    _check_parallel(config.parallel, architecture)
    if machine is not None:
        _check_machine(config.parallel, config.layer_spec, machine)
    check_layers(config.layer_spec, config.dtype)
    if config.optimizer.warmup_steps > config.steps:
        raise UserError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} has to be at most steps={config.steps}"
        )


def _check_ranges(config: Any) -> None:
    rules = (
        (AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
        (AT_LEAST_ZERO, "at least 0", lambda value: value >= 0),
        (ABOVE_ZERO, "above 0", lambda value: value > 0),
        (UP_TO_ONE, "at least 0 and at most 1", lambda value: 0 <= value <= 1),
        (SHARES, "above 0 and at most 1", lambda value: 0 < value <= 1),
        (BELOW_ONE, "at least 0 and below 1", lambda value: 0 <= value < 1),
    )
    for key, value in leaves(config):
        for keys, meaning, holds in rules:
            if key in keys and value is not None and not holds(value):
                raise UserError(f"{key} has to be {meaning}, not {value}")
        if isinstance(value, float) and math.isinf(value) and key != "objective.half_life":
            raise UserError(f"{key} has to be finite, not {value}")


def _check_parallel(parallel: ParallelConfig, architecture: "Architecture | None") -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1")
    if chunks is not None and (chunks < 2 or pp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} has to be null, or at least 2 with "
            "parallel.pipeline_model_parallel_size at least 2"
        )
    if architecture is not None:
        check_divisibility(architecture, parallel)


def _check_machine(
    parallel: ParallelConfig, layer_spec: str, machine: Machine, rollout: RolloutConfig | None = None
) -> None:
    """Ranks and rollout engines take GPUs of their own, unless colocated; on a machine without GPUs the engines share the ranks' cores."""
    kind, available = ("GPUs", machine.gpus) if machine.gpus else ("CPU cores", machine.cpus)
    apart = rollout is not None and machine.gpus and rollout.placement == "separate"
    engines = (
        rollout.num_engines * rollout.engine_tensor_parallel_size if rollout is not None and apart else 0
    )
    if parallel.world_size + engines > available:
        ranks = (
            f"the sizes of `parallel` need {parallel.world_size} ranks (tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data "
            f"{parallel.data_parallel_size})"
        )
        more = (
            f" and rollout.num_engines={rollout.num_engines} of rollout.engine_tensor_parallel_size="
            f"{rollout.engine_tensor_parallel_size} need {engines} more GPUs"
            if rollout is not None and engines
            else ""
        )
        raise UserError(
            f"{ranks}{more}, but there are {available} {kind}; lower one or join a larger Ray cluster (ray_address)"
        )
    if layer_spec == "transformer_engine" and not machine.gpus:
        raise UserError("layer_spec=transformer_engine needs a GPU; use auto or portable here")


def _check_precision(config: Config, architecture: "Architecture | None", machine: Machine | None) -> None:
    model, optimizer = config.model, config.optimizer
    check_layers(model.layer_spec, model.dtype)
    check_precision(model, optimizer)
    if architecture is not None and model.fp8 != "none":
        names = {"ffn": "feed-forward width", "query": "query size", "key": "key size"}
        split = {what: architecture.size(name) for name, what in names.items()}
        check_fp8_split(architecture.hidden_size, split, config.parallel)
    if machine is not None and not machine.gpus:
        check_accelerators(
            model, optimizer, Accelerators(capability=None, cuda=None, transformer_engine=None)
        )
    elif machine is not None and machine.accelerators is not None:
        check_accelerators(model, optimizer, machine.accelerators)
        check_adam(machine.accelerators)
    if model.fp8_param_gather and config.objective.kl_coefficient:
        raise UserError(
            "objective.kl_coefficient puts the initial weights in place for a while, which would round those that "
            "model.fp8_param_gather=true keeps; set it to false"
        )
    if config.deterministic and (
        model.fp8_param_gather or (model.fp8 != "none" and model.fp8_recipe == "delayed")
    ):
        raise UserError(
            "deterministic=true promises the same bits after a resume, but checkpoints hold neither FP8 weights nor delayed scales; "
            "set model.fp8_param_gather=false and model.fp8_recipe=blockwise or tensorwise"
        )


def _check_batch(config: Config) -> None:
    batch, rollout, parallel = config.batch, config.rollout, config.parallel
    if batch.prompts_per_iteration % batch.mini_batch_prompts:
        raise UserError(
            f"batch.mini_batch_prompts={batch.mini_batch_prompts} has to divide "
            f"batch.prompts_per_iteration={batch.prompts_per_iteration}"
        )
    if batch.responses_per_prompt < 2:
        raise UserError(
            "batch.responses_per_prompt has to be at least 2: advantages compare the responses to one prompt"
        )
    if parallel.data_parallel_size > batch.mini_batch_prompts * batch.responses_per_prompt:
        raise UserError(
            f"parallel.data_parallel_size={parallel.data_parallel_size} exceeds the "
            f"{batch.mini_batch_prompts * batch.responses_per_prompt} responses of a mini-batch; lower it or raise "
            "batch.mini_batch_prompts"
        )
    if rollout.max_prompts < batch.prompts_per_iteration:
        raise UserError(
            f"rollout.max_prompts={rollout.max_prompts} can never give batch.prompts_per_iteration={batch.prompts_per_iteration}; "
            "raise it"
        )
    longest = rollout.max_prompt_length + rollout.max_response_length
    multiple = parallel.pack_multiple(config.model.token_multiple)
    padded = -(-longest // multiple) * multiple
    room = batch.max_tokens_per_micro_batch * parallel.context_parallel_size
    if padded > room:
        raise UserError(
            f"a prompt and response may take {padded} padded tokens, but batch.max_tokens_per_micro_batch="
            f"{batch.max_tokens_per_micro_batch} x context_parallel_size={parallel.context_parallel_size} holds {room}; raise it "
            f"to at least {-(-padded // parallel.context_parallel_size)}, or lower rollout.max_response_length"
        )


def _check_rollout(config: Config, architecture: "Architecture | None") -> None:
    rollout = config.rollout
    heads = None if architecture is None else architecture.num_attention_heads
    if heads is not None and heads % rollout.engine_tensor_parallel_size:
        raise UserError(
            f"rollout.engine_tensor_parallel_size={rollout.engine_tensor_parallel_size} does not divide the model's {heads} attention "
            "heads; choose a divisor"
        )
    if rollout.engine != "vllm":
        for key, other in (("engine_tensor_parallel_size", 1), ("placement", "separate")):
            if getattr(rollout, key) != other:
                raise UserError(
                    f"rollout.{key}={getattr(rollout, key)} needs rollout.engine=vllm, not {rollout.engine}"
                )
    if rollout.placement == "colocated" and rollout.mode != "synchronous":
        raise UserError(
            f"rollout.placement=colocated needs rollout.mode=synchronous, not {rollout.mode}: engines sleep during updates"
        )
    if rollout.placement == "colocated" and (
        rollout.engine_tensor_parallel_size > 1 or rollout.num_engines > config.parallel.world_size
    ):
        raise UserError(
            f"rollout.placement=colocated puts each engine on the GPU of one of the {config.parallel.world_size} trainer ranks, so "
            f"rollout.num_engines={rollout.num_engines} of rollout.engine_tensor_parallel_size="
            f"{rollout.engine_tensor_parallel_size} do not fit; lower them or choose separate"
        )
    if rollout.mode != "synchronous" and rollout.max_staleness < 1:
        raise UserError(
            f"rollout.mode={rollout.mode} trains on groups one version old; raise rollout.max_staleness to 1 or more"
        )
    if rollout.mode == "fully_asynchronous" and rollout.unfinished == "drop":
        raise UserError(
            "rollout.mode=fully_asynchronous needs rollout.unfinished=continue: new weights come while responses are half done"
        )
    least = 2 if rollout.mode == "one_step_off" else 1
    if rollout.unfinished == "continue" and rollout.max_staleness < least:
        raise UserError(
            f"rollout.unfinished=continue with rollout.mode={rollout.mode} needs rollout.max_staleness of at least {least}, not "
            f"{rollout.max_staleness}: what goes on under new weights would be dropped as too old"
        )
    if config.objective.correction != "none" and rollout.top_p < 1:
        raise UserError(
            f"objective.correction={config.objective.correction} compares whole distributions, but rollout.top_p={rollout.top_p} samples "
            "from a part; set rollout.top_p=1 or objective.correction=none"
        )
    if config.deterministic and (rollout.mode == "fully_asynchronous" or rollout.unfinished == "continue"):
        raise UserError(
            "deterministic=true needs rollout.mode=synchronous or one_step_off and rollout.unfinished=drop: otherwise timing decides "
            "which tokens are sampled with which weights"
        )


def _check_objective(objective: ObjectiveSettings) -> None:
    clip = objective.influence_clip
    if clip is not None and not (len(clip) == 2 and 0 <= clip[0] <= clip[1] and math.isfinite(clip[1])):
        raise UserError(
            f"objective.influence_clip={clip} has to be two rising numbers, such as [1.0,1.2], or null"
        )
    key, clip_above = (
        ("clip_low", objective.clip_low) if objective.name == "grpo" else ("clip_high", objective.clip_high)
    )
    if not objective.dual_clip > 1 + clip_above:
        raise UserError(
            f"objective.dual_clip={objective.dual_clip} has to be above 1 + objective.{key} = {1 + clip_above}"
        )
    if objective.kl_coefficient and objective.name != "grpo":
        raise UserError(
            f"objective.kl_coefficient is for grpo only; set it to 0 with objective.name={objective.name}"
        )
    if objective.normalization != "token_mean" and objective.name == "grpo":
        raise UserError(
            f"objective.normalization={objective.normalization} is not for grpo, which averages per response; leave it token_mean"
        )


def _check_data(config: Config, training: bool) -> None:
    data = config.data
    if data.source == "countdown":
        if config.reward.name != "countdown":
            raise UserError(f"data.source=countdown needs reward.name=countdown, not {config.reward.name}")
        return
    if training and not data.train_path:
        raise UserError(f"data.source={data.source} needs data.train_path, a file of training rows")
    if not data.evaluation_path and (
        not training or config.evaluation.every or config.evaluation.before_training
    ):
        hint = ", or evaluation.every=0 and evaluation.before_training=false" if training else ""
        raise UserError(
            f"data.source={data.source} needs data.evaluation_path, a file of held-out rows{hint}"
        )


def _check_positions(rollout: RolloutConfig, architecture: "Architecture | None") -> None:
    longest = rollout.max_prompt_length + rollout.max_response_length
    if architecture is not None and longest > architecture.max_position_embeddings:
        raise UserError(
            f"rollout.max_prompt_length={rollout.max_prompt_length} + max_response_length={rollout.max_response_length} = "
            f"{longest} tokens exceed the model's max_position_embeddings={architecture.max_position_embeddings}; shorten them, "
            "or raise that number in the model's config.json if the model is meant to grow beyond the length it was trained on"
        )
