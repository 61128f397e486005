"""Print a plan as tables."""

from collections.abc import Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_fipo.config import Config, ModelConfig
from megatron_fipo.families.family import Architecture
from megatron_fipo.plan.plan import Plan, Stage


def print_plan(config: Config, architecture: Architecture, plan: Plan, console: Console) -> None:
    """Print what `train` would do with this configuration."""
    for table in (
        _overview(config, architecture, plan),
        _ranks(config, plan),
        _stages(plan),
        _iteration(config, plan),
    ):
        console.print(table)
    console.print(
        "Memory is weights, gradients and optimizer state of a rank, without activations and rollout engines."
    )
    host = max(stage.host_bytes for stage in plan.stages)
    if host:
        console.print(
            f"A rank holds up to {host / 2**30:.2f} GiB more of optimizer state and gradients in host memory."
        )
    logits = config.head.logits_memory_mb
    kept = f"up to {logits} MiB of logits for backward" if logits else "no logits"
    console.print(f"The head works in {config.head.workspace_mb} MiB and keeps {kept}.")
    console.print("Dry run: nothing was started and nothing was written.")


def precision(model: ModelConfig) -> str:
    """For example "bfloat16", or "bfloat16, products in FP8 (hybrid, blockwise)"."""
    if model.fp8 == "none":
        return model.dtype
    in_fp8 = "products and layer weights" if model.fp8_param_gather else "products"
    return f"{model.dtype}, {in_fp8} in FP8 ({model.fp8}, {model.fp8_recipe})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("ranks", "layers", "holds") else "right", no_wrap=True
        )
    return table


def _overview(config: Config, architecture: Architecture, plan: Plan) -> RenderableType:
    padding = plan.padded_vocab - architecture.vocab_size
    table = Table(
        title=Text("Run", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, show_header=False
    )
    table.add_row("model", config.model.path)
    table.add_row(
        "parameters", f"{plan.parameters:,} ({plan.parameters / 1e9:.2f}B), {precision(config.model)}"
    )
    table.add_row(
        "shape",
        f"{architecture.num_layers} layers, hidden {architecture.hidden_size}, "
        f"{architecture.num_attention_heads} heads in {architecture.num_query_groups} key-value groups, "
        f"feed-forward {architecture.ffn_hidden_size}",
    )
    table.add_row(
        "vocabulary",
        f"{architecture.vocab_size:,}" + (f", padded to {plan.padded_vocab:,}" if padding else ""),
    )
    table.add_row("objective", config.objective.name)
    table.add_row("sequence parallel", "yes" if config.parallel.sequence_parallel else "no")
    table.add_row("iterations", f"{config.iterations:,}")
    table.add_row("run directory", config.run_dir)
    return table


def _ranks(config: Config, plan: Plan) -> RenderableType:
    parallel = config.parallel
    title = f"Ranks: {parallel.world_size} = tensor {parallel.tensor_model_parallel_size} x context "
    title += f"{parallel.context_parallel_size} x data {parallel.data_parallel_size} x pipeline "
    title += f"{parallel.pipeline_model_parallel_size}"
    table = _table(title, "ranks", "tensor", "context", "data", "pipeline", "virtual chunks")
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    for group in plan.groups:
        ranks, tensor = _span(group.first_rank, group.last_rank), _span(0, group.last_rank - group.first_rank)
        table.add_row(ranks, tensor, str(group.context), str(group.data), str(group.pipeline), str(chunks))
    return table


def _stages(plan: Plan) -> RenderableType:
    largest = max(stage.total_bytes for stage in plan.stages)
    unit, scale = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    columns = ("stage", "layers", "holds", "parameters", "weights", "grads", "optim", "sum")
    table = _table(f"Each rank of a pipeline stage (memory in {unit})", *columns)
    for stage in plan.stages:
        sizes = (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.total_bytes)
        table.add_row(
            str(stage.index),
            "\n".join(_span(chunk.start, chunk.stop - 1) for chunk in stage.layers),
            "\n".join(_ends(stage)),
            f"{stage.parameters:,}",
            *(f"{size / scale:.2f}" for size in sizes),
        )
    return table


def _iteration(config: Config, plan: Plan) -> RenderableType:
    work, rollout = plan.work, config.rollout
    table = Table(
        title=Text("One iteration, at most", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    engines = f"{rollout.num_engines} {rollout.engine} engine{'s' if rollout.num_engines > 1 else ''}"
    if rollout.engine_tensor_parallel_size > 1:
        engines += f" x {rollout.engine_tensor_parallel_size} ranks"
    table.add_row("rollout", f"{work.responses_in_flight:,} responses at a time, {rollout.mode}, {engines}")
    table.add_row("trained on", f"{work.responses:,} responses, {work.tokens_per_iteration:,} tokens")
    table.add_row(
        "longest sequence",
        f"{work.longest_sequence:,} tokens, padded to a multiple of {config.parallel.length_multiple}",
    )
    table.add_row("mini-steps", f"{work.mini_steps} optimizer steps")
    table.add_row(
        "tokens per step", f"{work.tokens_per_mini_step:,} in {work.responses_per_mini_step:,} responses"
    )
    table.add_row(
        "micro-batches",
        f"{work.micro_batches} per step on each data-parallel rank, of {work.micro_batch_tokens:,} tokens "
        f"({config.batch.max_tokens_per_micro_batch:,} per rank)",
    )
    return table


def _span(first: int, last: int) -> str:
    """A range of integers, both ends included."""
    return str(first) if first == last else f"{first}-{last}"


def _ends(stage: Stage) -> Iterator[str]:
    """What the stage has besides layers."""
    if stage.has_embedding:
        yield "embedding"
    if stage.has_output:
        yield "output"
