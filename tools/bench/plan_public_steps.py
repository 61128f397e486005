"""The planner against public steps of NeMo-RL on H100, and what it expects of this software in one of these cases.

    python -m tools.bench.plan_public_steps        # half a minute; prints two tables for docs/planning.md

Nothing is measured here. The rows and their assumptions are those of `tests/plan/time/nemo_rl_rows.py`.

The case of the second table is NeMo-RL v0.7's Qwen3-32B on 32 H100: 2,048 samples of 3,256 tokens on average, at most 4,096,
one optimizer step per iteration, one log-prob pass, every group trained on. Its measured rate is 665 tokens per second and GPU.
"""

from collections.abc import Iterator

from megatron_fipo.config import load_config
from megatron_fipo.plan.case import case_of
from megatron_fipo.plan.machine_file import load_machine
from megatron_fipo.plan.render_search import engines_text, layout_text
from megatron_fipo.plan.search import MODES, search
from megatron_fipo.plan.table import figure, with_interval
from megatron_fipo.plan.workload import Assumptions
from tests.plan.time.nemo_rl_rows import CALIBRATION, MODELS, PHASES, ROWS
from tests.plan.time.nemo_rl_step import predict
from tools.bench.harness import parser, table

MACHINE = load_machine("h100-80gb")
PUBLIC_RATE, GPUS = 665.0, 32
SETTINGS = (
    "batch.prompts_per_iteration=64",
    "batch.responses_per_prompt=32",
    "batch.mini_batch_prompts=64",
    "rollout.max_prompt_length=128",
    "rollout.max_response_length=3968",
    "rollout.prompts_in_flight=64",
    "rollout.max_prompts=64",
    "reward.overlong_buffer=0",
    "evaluation.every=0",
    "checkpoint.every=0",
)
PRECISIONS = {
    "BF16": (),
    "FP8 blockwise": ("model.fp8=hybrid",),
    "FP8 tensorwise": ("model.fp8=hybrid", "model.fp8_recipe=tensorwise"),
}


def public_steps() -> Iterator[tuple[str, ...]]:
    for kind, rows in (("calibration", CALIBRATION), ("phases", PHASES), ("step", ROWS)):
        for row in rows:
            predicted = predict(row, MACHINE).total
            yield row.name, kind, f"{row.seconds:g}", figure(predicted), f"{predicted / row.seconds:.2f}"


def own_steps() -> Iterator[tuple[str, ...]]:
    """The fastest layout of each mode that this software runs, by precision of the trainer."""
    family, architecture = MODELS["32B"]
    assumptions = Assumptions(prompt_tokens=100, response_end=3_156, informative=1.0)
    for precision, overrides in PRECISIONS.items():
        config = load_config("examples/qwen2.5-32b/fipo.yaml", [*SETTINGS, *overrides])
        found = search(case_of(config, family, architecture, MACHINE, assumptions), GPUS)
        for mode in MODES:
            best = next(result for result in found if result.case.config.rollout.mode == mode)
            rate, case = best.iteration.rate, best.case
            yield (
                precision,
                mode,
                layout_text(case),
                engines_text(case),
                figure(best.iteration.total.value),
                with_interval(rate),
                f"{rate.value / PUBLIC_RATE:.2f} ({rate.low / PUBLIC_RATE:.2f} to {rate.high / PUBLIC_RATE:.2f})",
            )


def main() -> None:
    parser(__doc__).parse_args()
    print(
        table(("row", "used as", "measured, s", "predicted, s", "predicted / measured"), list(public_steps()))
    )
    heads = ("trainer", "mode", "layout", "engines", "iteration, s", "tokens/s/GPU", f"/ {PUBLIC_RATE:g}")
    print("\n" + table(heads, list(own_steps())))


if __name__ == "__main__":
    main()
