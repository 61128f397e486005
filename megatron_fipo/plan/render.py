"""Print a plan as tables: what is fixed by the configuration. `render_cost.py` prints what is estimated."""

from collections.abc import Iterator

from rich.console import Console, RenderableType

from megatron_fipo.config import ModelConfig, ParallelConfig
from megatron_fipo.families.family import Architecture, Experts, Layers
from megatron_fipo.plan.experts import active_experts, expert_replicas, layer_counts
from megatron_fipo.plan.memory.state import Stage
from megatron_fipo.plan.plan import Plan, Times
from megatron_fipo.plan.render_cost import (
    engine_table,
    iteration_table,
    memory_table,
    print_basis,
    result_table,
    update_table,
)
from megatron_fipo.plan.table import table
from megatron_fipo.plan.time.weights import model_weights

ROWS = 16
"""Groups of ranks that are printed, at most."""


def print_plan(plan: Plan, times: Times | None, console: Console) -> None:
    """Print what `train` would do with this configuration; no times if its engines do not fit."""
    case = plan.case
    tables, estimates = [_overview(plan)], [plan.node.total, *(memory.total for memory in plan.memory)]
    if times is not None:
        one = times.iteration
        tables += [result_table(case, one, times.run), iteration_table(case, one), update_table(one)]
        estimates.append(times.run)
    tables += [memory_table(case, plan.memory), engine_table(case, plan.engine, plan.node)]
    tables += [_iteration(plan), _stages(plan), _ranks(plan)]
    for made in tables:
        console.print(made)
    print_basis(case, estimates, console)
    for misfit in plan.misfits:
        if not misfit.fatal:
            console.print(f"Warning: {misfit.reason}.", highlight=False)
    console.print("Nothing was started and nothing was written.")


def precision(model: ModelConfig) -> str:
    """For example "bfloat16", or "bfloat16, products in FP8 (hybrid, blockwise)"."""
    if model.fp8 == "none":
        return model.dtype
    in_fp8 = "products and layer weights" if model.fp8_param_gather else "products"
    return f"{model.dtype}, {in_fp8} in FP8 ({model.fp8}, {model.fp8_recipe})"


def _overview(plan: Plan) -> RenderableType:
    config, architecture = plan.case.config, plan.case.architecture
    padding = plan.padded_vocab - architecture.vocab_size
    made = table("Run")
    made.add_row("model", config.model.path)
    made.add_row("parameters", f"{_parameters(plan)}, {precision(config.model)}")
    made.add_row("shape", _shape(architecture))
    if architecture.experts is not None:
        made.add_row("experts", _experts(architecture, architecture.experts))
    made.add_row(
        "vocabulary",
        f"{architecture.vocab_size:,}" + (f", padded to {plan.padded_vocab:,}" if padding else ""),
    )
    made.add_row("objective", config.objective.name)
    made.add_row("sequence parallel", "yes" if config.parallel.sequence_parallel else "no")
    if architecture.experts is not None:
        made.add_row("expert parallel", _expert_parallel(config.parallel, architecture.experts))
    made.add_row("iterations", f"{config.iterations:,}")
    made.add_row("run directory", config.run_dir)
    return made


def _parameters(plan: Plan) -> str:
    """With experts also those that process a token."""
    weights, architecture = model_weights(plan.case), plan.case.architecture
    active = weights.ends + weights.dense + weights.expert * active_experts(architecture)
    of_token = "" if architecture.experts is None else f", {_short(active)} per token"
    return f"{plan.parameters:,} ({_short(plan.parameters)}{of_token})"


def _short(parameters: int) -> str:
    """`30.53B`, or `494.03M` below a billion."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"


def _shape(architecture: Architecture) -> str:
    text = (
        f"{architecture.num_layers} layers, hidden {architecture.hidden_size}, "
        f"{architecture.num_attention_heads} heads in {architecture.num_query_groups} key-value groups"
    )
    dense = layer_counts(architecture).get(Layers.DENSE, 0)
    if not dense:
        return text
    where = "" if architecture.experts is None else f" in {dense} of them"
    return f"{text}, feed-forward {architecture.ffn_hidden_size}{where}"


def _experts(architecture: Architecture, experts: Experts) -> str:
    layers = layer_counts(architecture)[Layers.EXPERTS]
    return f"{experts.count} of width {experts.ffn_hidden_size} in {layers} layers, {experts.per_token} per token"


def _expert_parallel(parallel: ParallelConfig, experts: Experts) -> str:
    ranks, shared = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    text = f"{ranks} rank{'s' if ranks > 1 else ''} of {experts.count // ranks} experts"
    text += f" x tensor {shared}" if shared > 1 else ""
    return f"{text} x data {expert_replicas(parallel)}"


def _ranks(plan: Plan) -> RenderableType:
    parallel = plan.case.config.parallel
    title = f"Ranks: {parallel.world_size} = tensor {parallel.tensor_model_parallel_size} x context "
    title += f"{parallel.context_parallel_size} x data {parallel.data_parallel_size} x pipeline "
    title += f"{parallel.pipeline_model_parallel_size}"
    made = table(title, "ranks", "tensor", "context", "data", "pipeline", "virtual chunks")
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    for group in plan.groups[:ROWS]:
        ranks, tensor = _span(group.first_rank, group.last_rank), _span(0, group.last_rank - group.first_rank)
        made.add_row(ranks, tensor, str(group.context), str(group.data), str(group.pipeline), str(chunks))
    if len(plan.groups) > ROWS:
        made.add_row(f"and so on, {len(plan.groups)} groups", "", "", "", "", "")
    return made


def _stages(plan: Plan) -> RenderableType:
    made = table("Pipeline stages", "stage", "layers", "holds", "parameters of a rank")
    for stage in plan.stages:
        layers = "\n".join(_span(chunk.start, chunk.stop - 1) for chunk in stage.layers)
        made.add_row(str(stage.index), layers, "\n".join(_ends(stage)), f"{stage.parameters:,}")
    return made


def _iteration(plan: Plan) -> RenderableType:
    work, config = plan.work, plan.case.config
    rollout = config.rollout
    made = table("Work of one iteration, at most")
    engines = f"{rollout.num_engines} {rollout.engine} engine{'s' if rollout.num_engines > 1 else ''}"
    if rollout.engine_tensor_parallel_size > 1:
        engines += f" x {rollout.engine_tensor_parallel_size} ranks"
    made.add_row("rollout", f"{work.responses_in_flight:,} responses at a time, {rollout.mode}, {engines}")
    made.add_row("trained on", f"{work.responses:,} responses, {work.tokens_per_iteration:,} tokens")
    made.add_row(
        "longest sequence",
        f"{work.longest_sequence:,} tokens, padded to a multiple of {config.parallel.length_multiple}",
    )
    made.add_row("mini-steps", f"{work.mini_steps} optimizer steps")
    made.add_row(
        "tokens per step", f"{work.tokens_per_mini_step:,} in {work.responses_per_mini_step:,} responses"
    )
    made.add_row(
        "micro-batches",
        f"{work.micro_batches} per step on each data-parallel rank, of {work.micro_batch_tokens:,} tokens "
        f"({config.batch.max_tokens_per_micro_batch:,} per rank)",
    )
    return made


def _span(first: int, last: int) -> str:
    """A range of integers, both ends included."""
    return str(first) if first == last else f"{first}-{last}"


def _ends(stage: Stage) -> Iterator[str]:
    """What the stage has besides layers."""
    if stage.has_embedding:
        yield "embedding"
    if stage.has_output:
        yield "output"
