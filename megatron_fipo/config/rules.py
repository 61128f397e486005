"""Checks of settings against each other, the model and the machine, before anything starts. Pure: facts are arguments."""

from typing import TYPE_CHECKING

from megatron_fipo.config.divisibility import check_divisibility
from megatron_fipo.config.environment_rules import check_environment
from megatron_fipo.config.gpu_rules import (
    check_accelerators,
    check_adam,
    check_fp8_experts,
    check_fp8_shards,
    check_layers,
    check_precision,
)
from megatron_fipo.config.judge_rules import check_judges
from megatron_fipo.config.placement import check_placement, engine_gpus, sharing_obstacle, with_placement
from megatron_fipo.config.schema import Config, ParallelConfig, RolloutConfig
from megatron_fipo.config.set_rules import check_data, check_limits, check_temperatures
from megatron_fipo.config.sft_rules import check_start, check_supervised_data
from megatron_fipo.config.sft_schema import SftConfig
from megatron_fipo.environment import Accelerators, Machine
from megatron_fipo.errors import UserError

if TYPE_CHECKING:
    from megatron_fipo.families.family import Architecture

TAKE_MORE = "lower one or join a larger Ray cluster (ray_address)"


def validate(
    config: Config, architecture: "Architecture | None" = None, machine: Machine | None = None
) -> None:
    """Check a training configuration; raises UserError with the first invalid key and the fix.

    Without `architecture` the checks against the model are skipped, without `machine` those against cores and GPUs.
    """
    check_environment(config)
    _check_parallel(config.parallel, architecture)
    if machine is not None:
        _check_run_on(config, machine)
    _check_precision(config, architecture, machine)
    _check_router(config, architecture)
    if config.parallel.overlap_communication and not config.optimizer.distributed:
        raise UserError("parallel.overlap_communication needs optimizer.distributed=true")
    _check_batch(config)
    _check_rollout(config, architecture)
    check_data(config, training=True)
    check_limits(config, training=True)
    check_temperatures(config)
    check_judges(config)
    _check_positions(config.rollout, architecture)


def validate_evaluation(config: Config, architecture: "Architecture | None" = None) -> None:
    """Check what evaluation needs; checks across training settings are skipped. Raises UserError."""
    check_environment(config)
    check_data(config, training=False)
    check_limits(config, training=False)
    check_temperatures(config)
    check_judges(config)
    _check_positions(config.rollout, architecture)


def validate_sft(
    config: SftConfig, architecture: "Architecture | None" = None, machine: Machine | None = None
) -> None:
    """Check a supervised configuration; arguments as in `validate`. Raises UserError."""
    check_start(config)
    check_supervised_data(config, architecture)
    _check_parallel(config.parallel, architecture)
    if machine is not None:
        _check_machine(config.parallel, config.layer_spec, machine)
    check_layers(config.layer_spec, config.dtype)
    if config.optimizer.warmup_steps > config.steps:
        raise UserError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be at most steps={config.steps}"
        )


def _check_parallel(parallel: ParallelConfig, architecture: "Architecture | None") -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1")
    if chunks is not None and (chunks < 2 or pp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} must be null, or at least 2 with "
            "parallel.pipeline_model_parallel_size at least 2"
        )
    if architecture is not None:
        check_divisibility(architecture, parallel)


def _check_run_on(config: Config, machine: Machine) -> None:
    """Ranks and rollout engines have separate GPUs unless colocated; without GPUs the engines share the ranks' cores."""
    rollout, parallel, engines, fix = config.rollout, config.parallel, 0, ""
    if machine.gpus and not with_placement(config, machine.gpus).rollout.colocated:
        engines = engine_gpus(config)
    if engines and machine.gpus >= parallel.world_size:
        obstacle = sharing_obstacle(config)
        fix = ", or let engines share the ranks' GPUs: rollout.placement=colocated " + (
            obstacle or "does that"
        )
    _check_machine(parallel, config.model.layer_spec, machine)
    if parallel.world_size + engines > machine.gpus and engines and not machine.may_grow:
        raise UserError(
            f"{_ranks(parallel)} and rollout.num_engines={rollout.num_engines} of rollout.engine_tensor_parallel_size="
            f"{rollout.engine_tensor_parallel_size} need {engines} more GPUs, but there are {machine.gpus} GPUs; {TAKE_MORE}{fix}"
        )


def _check_machine(parallel: ParallelConfig, layer_spec: str, machine: Machine) -> None:
    """Each rank has a GPU, or a core if there are no GPUs."""
    kind, available = ("GPUs", machine.gpus) if machine.gpus else ("CPU cores", machine.cpus)
    if parallel.world_size > available and not machine.may_grow:
        raise UserError(f"{_ranks(parallel)}, but there are {available} {kind}; {TAKE_MORE}")
    if layer_spec == "transformer_engine" and not machine.gpus:
        raise UserError("layer_spec=transformer_engine needs a GPU; use auto or portable here")


def _ranks(parallel: ParallelConfig) -> str:
    return (
        f"the sizes of `parallel` need {parallel.world_size} ranks (tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data "
        f"{parallel.data_parallel_size})"
    )


def _check_precision(config: Config, architecture: "Architecture | None", machine: Machine | None) -> None:
    model, optimizer = config.model, config.optimizer
    check_layers(model.layer_spec, model.dtype)
    check_precision(model, optimizer)
    if architecture is not None and model.fp8 != "none":
        names = {"ffn": "feed-forward width", "query": "query size", "key": "key size"}
        sharded = {what: architecture.size(name) for name, what in names.items()}
        check_fp8_shards(architecture.hidden_size, sharded, config.parallel)
        if architecture.experts is not None:
            check_fp8_experts(architecture.experts.ffn_hidden_size, config.parallel)
    if machine is not None and not machine.gpus:
        check_accelerators(
            model, optimizer, Accelerators(capability=None, cuda=None, transformer_engine=None)
        )
    elif machine is not None and machine.accelerators is not None:
        check_accelerators(model, optimizer, machine.accelerators)
        check_adam(machine.accelerators)
    if model.fp8_param_gather and config.objective.kl_coefficient:
        raise UserError(
            "objective.kl_coefficient loads the initial weights temporarily, which would round the weights that "
            "model.fp8_param_gather=true keeps; set it to false"
        )
    if config.deterministic and (
        model.fp8_param_gather or (model.fp8 != "none" and model.fp8_recipe == "delayed")
    ):
        raise UserError(
            "deterministic=true promises the same bits after a resume, but checkpoints contain neither FP8 weights nor delayed scales; "
            "set model.fp8_param_gather=false and model.fp8_recipe=blockwise or tensorwise"
        )


def _check_router(config: Config, architecture: "Architecture | None") -> None:
    router, rollout = config.model.router, config.rollout
    if router.load_balancing and not router.trainable:
        raise UserError(
            f"model.router.load_balancing={router.load_balancing:g} trains the router; set model.router.trainable=true, or "
            "model.router.load_balancing=0"
        )
    if router.replay != "rollout":
        return
    other = "choose model.router.replay=old_log_probs"
    if architecture is not None and architecture.experts is None:
        raise UserError(f"model.router.replay=rollout needs a model with experts; {other}")
    if architecture is not None and architecture.experts is not None and architecture.experts.per_token == 1:
        raise UserError(
            f"model.router.replay=rollout needs more than one expert per token: a route to expert 0 could not be told from none; {other}"
        )
    if rollout.engine == "local":
        raise UserError(
            f"model.router.replay=rollout needs the routes of the rollout engine, which local does not report; {other} or "
            "rollout.engine=vllm"
        )
    if rollout.engine == "vllm" and rollout.temperature != 1:
        raise UserError(
            f"model.router.replay=rollout needs rollout.temperature=1, not {rollout.temperature:g}: only vLLM's newer model runner "
            f"reports routes, and the log-probs of another temperature need the older one; {other}"
        )
    if rollout.engine == "vllm" and config.deterministic:
        raise UserError(
            f"model.router.replay=rollout needs vLLM's prefix cache, which deterministic=true turns off; {other}"
        )


def _check_batch(config: Config) -> None:
    batch, rollout, parallel = config.batch, config.rollout, config.parallel
    if batch.prompts_per_iteration % batch.mini_batch_prompts:
        raise UserError(
            f"batch.mini_batch_prompts={batch.mini_batch_prompts} must divide "
            f"batch.prompts_per_iteration={batch.prompts_per_iteration}"
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
    longest = rollout.longest_sequence
    multiple = parallel.pack_multiple(config.model.token_multiple)
    padded = -(-longest // multiple) * multiple
    capacity = batch.max_tokens_per_micro_batch * parallel.context_parallel_size
    if padded > capacity:
        raise UserError(
            f"a prompt and response may take {padded} padded tokens, but batch.max_tokens_per_micro_batch="
            f"{batch.max_tokens_per_micro_batch} x context_parallel_size={parallel.context_parallel_size} holds {capacity}; raise it "
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
        if rollout.engine_tensor_parallel_size != 1:
            raise UserError(
                f"rollout.engine_tensor_parallel_size={rollout.engine_tensor_parallel_size} needs rollout.engine=vllm, not "
                f"{rollout.engine}"
            )
        if rollout.vllm:
            raise UserError(
                f"rollout.vllm has arguments of vLLM and needs rollout.engine=vllm, not {rollout.engine}"
            )
    check_placement(config)
    if rollout.mode != "synchronous" and rollout.max_staleness < 1:
        raise UserError(
            f"rollout.mode={rollout.mode} trains on groups one version old; raise rollout.max_staleness to 1 or more"
        )
    if rollout.mode == "fully_asynchronous" and rollout.unfinished == "drop":
        raise UserError(
            "rollout.mode=fully_asynchronous needs rollout.unfinished=continue: new weights arrive while responses are unfinished"
        )
    least = 2 if rollout.mode == "one_step_off" else 1
    if rollout.unfinished == "continue" and rollout.max_staleness < least:
        raise UserError(
            f"rollout.unfinished=continue with rollout.mode={rollout.mode} needs rollout.max_staleness of at least {least}, not "
            f"{rollout.max_staleness}: responses that continue under new weights would be dropped as too old"
        )
    for key, complete in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        value = getattr(rollout, key)
        if config.objective.correction != "none" and value != complete:
            raise UserError(
                f"objective.correction={config.objective.correction} compares complete distributions, but rollout.{key}={value} "
                f"truncates them; set rollout.{key}={complete} or objective.correction=none"
            )
    if config.deterministic and (rollout.mode == "fully_asynchronous" or rollout.unfinished == "continue"):
        raise UserError(
            "deterministic=true needs rollout.mode=synchronous or one_step_off and rollout.unfinished=drop: otherwise timing "
            "decides which tokens are sampled with which weights"
        )


def _check_positions(rollout: RolloutConfig, architecture: "Architecture | None") -> None:
    longest = rollout.longest_sequence
    if architecture is not None and longest > architecture.max_position_embeddings:
        raise UserError(
            f"rollout.max_prompt_length={rollout.max_prompt_length} + max_response_length={rollout.max_response_length} = "
            f"{longest} tokens exceed the model's max_position_embeddings={architecture.max_position_embeddings}; shorten them, "
            "or raise that number in the model's config.json to train beyond the length the model was trained on"
        )
