"""Print the layouts that a search found."""

from collections.abc import Mapping, Sequence

from rich.console import Console, RenderableType

from megatron_fipo.plan.case import Case
from megatron_fipo.plan.iteration import run_time
from megatron_fipo.plan.render_cost import print_basis
from megatron_fipo.plan.search import MODES, Found, changes
from megatron_fipo.plan.table import duration, table, with_interval

SHOWN = 3
"""Layouts of each mode."""
NOTES = (
    "tokens/s: trained, per GPU, engines included, at the mean length of the end of training. gain: compared with the "
    "configuration on its own GPUs. memory: of the fullest trainer rank. PP4x2: 4 stages of 2 chunks; full, selective: "
    "recomputation; 20 x TP4: 20 engines of 4 GPUs. Asynchronous modes train on older weights and need objective.correction "
    "(docs/rollouts.md)."
)


def print_search(case: Case, found: Sequence[Found], shown_rate: float, console: Console) -> None:
    """The fastest layouts of each mode, and the settings of the fastest. `shown_rate` is that of the present layout."""
    for mode in MODES:
        of_mode = [result for result in found if result.case.config.rollout.mode == mode]
        if not of_mode:
            console.print(f"{mode}: no layout fits.", highlight=False)
            continue
        console.print(_layouts(mode, of_mode[:SHOWN], shown_rate))
        best = of_mode[0].case
        settings = changes(case, best)
        if mode != "synchronous" and case.config.objective.correction == "none":
            settings["objective.correction"] = "tis"
        time = f"{case.config.iterations:,} iterations take {duration(run_time(best, of_mode[0].iteration))}."
        console.print(
            f"The first is limited by {of_mode[0].iteration.binding}. {time} Its settings:", highlight=False
        )
        console.print(
            f"  {overrides(settings) or 'those of the configuration'}\n", highlight=False, soft_wrap=True
        )
    console.print(NOTES, highlight=False)
    print_basis(case, [result.iteration.total for result in found], console)


def _layouts(mode: str, found: Sequence[Found], shown_rate: float) -> RenderableType:
    title = f"{mode}, {found[0].case.devices:,} GPUs"
    made = table(title, "layout", "engines", "tokens/s", "gain", "memory")
    for result in found:
        rate = result.iteration.rate.value
        made.add_row(
            layout_text(result.case),
            engines_text(result.case),
            with_interval(result.iteration.rate),
            f"{rate / shown_rate:.2f}",
            f"{result.memory.total.value / result.case.machine.device_bytes:.0%}",
        )
    return made


def layout_text(case: Case) -> str:
    """For example "TP4 CP2 PP2x4 DP8 EP8 selective"; the last word is `model.recompute`, left out if none. EP, and ETP for
    expert_tensor_parallel_size, are left out if 1."""
    parallel, recompute = case.config.parallel, case.config.model.recompute
    chunks = parallel.virtual_pipeline_model_parallel_size
    sizes = f"TP{parallel.tensor_model_parallel_size} CP{parallel.context_parallel_size}"
    sizes += f" PP{parallel.pipeline_model_parallel_size}" + (f"x{chunks}" if chunks else "")
    sizes += f" DP{parallel.data_parallel_size}"
    for name, size in (
        ("EP", parallel.expert_model_parallel_size),
        ("ETP", parallel.expert_tensor_parallel_size),
    ):
        sizes += f" {name}{size}" if size > 1 else ""
    return sizes + ("" if recompute == "none" else f" {recompute}")


def engines_text(case: Case) -> str:
    """For example "16 x TP4"."""
    rollout = case.config.rollout
    colocated = " colocated" if case.colocated else ""
    return f"{rollout.num_engines} x TP{rollout.engine_tensor_parallel_size}{colocated}"


def overrides(settings: Mapping[str, object]) -> str:
    """Settings by dotted key as `key=value`, for a command line."""
    return " ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
