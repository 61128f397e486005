"""A simulated run as one HTML page without scripts or external files."""

from collections.abc import Sequence
from html import escape

from megatron_fipo.report.page import html_page, html_table
from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.pictures import Curve, curves, gantt
from megatron_fipo.simulate.scaling import Curve as Scaling
from megatron_fipo.simulate.summary import Row, accuracy, operation_rows, summary, time_by_cause
from megatron_fipo.simulate.times import Basis
from megatron_fipo.simulate.training import Training

LEFT_OUT = (
    "Iterations between those that are simulated are interpolated: in a run of 60 small iterations the sum differed by 0.3 % from "
    "that of all of them (tests/simulate/test_training.py).",
    "Whether a group is informative does not depend on the lengths of its responses, or on the state of training.",
    "Scoring takes no time, and the driver's own work none (docs/benchmarks.md: seconds per iteration).",
    "The driver knows how many requests wait in an engine at once; the real one asks every 2 seconds.",
    "Evaluations have the response lengths of training.",
    "Losses come at random and one at a time. Nodes for a replacement are there; slow nodes, queues of the cluster and time limits "
    "are left out.",
    "A checkpoint counts from the moment at which the run continues, not when its files are complete.",
)


def render_page(name: str, training: Training, scaling: Scaling, operation: Operation, basis: Basis) -> str:
    """The complete page; `name` is its title."""
    case, config = training.case, training.case.config
    facts = (
        f"Simulated: {case.devices:,} x {case.machine.device}, model {config.model.path}, {config.rollout.mode}, "
        f"unfinished: {config.rollout.unfinished}, {config.iterations:,} iterations of "
        f"{config.batch.prompts_per_iteration:,} x {config.batch.responses_per_prompt:,} responses"
    )
    body = "".join(
        (
            f'<header><h1>{escape(name)}</h1><p class="facts">{escape(facts)}</p></header>',
            f'<section class="headline"><h2>Result</h2>{html_table(("", ""), summary(training))}'
            f"<p>{escape(_range_note())} {escape(accuracy(training))}</p></section>",
            f"<section><h2>Where the time goes</h2>{html_table(('', 'time', 'share'), time_by_cause(training))}</section>",
            f"<section><h2>One iteration</h2>{_gantt(training)}</section>",
            f"<section><h2>Over the number of GPUs</h2>{_over_gpus(training, scaling)}</section>",
            f"<section><h2>Over training</h2>{_over_training(training)}</section>",
            f"<section><h2>Assumptions</h2>{_assumptions(training, operation, basis)}</section>",
        )
    )
    return html_page(f"{name}, simulated", body)


def _range_note() -> str:
    return (
        "The range of the wall time spans the planner's intervals, and 90 % of what losses at the stated rates do. "
        "Trained tokens are prompts and responses of the batch; generated ones are all response tokens that the engines gave. "
        "Both rates are over the wall time and all GPUs."
    )


def _gantt(training: Training) -> str:
    window = training.windows[-1]
    iteration = window.iterations[-1]
    most = max((load.running for load in iteration.usage.loads), default=1)
    return f'<div class="grid wide">{gantt(iteration, window.engines, max(most, 1))}</div>'


def _over_gpus(training: Training, scaling: Scaling) -> str:
    runs = scaling.runs
    note = (
        ""
        if scaling.refused is None
        else f'<p class="absent">The curves end there: {escape(scaling.refused)}.</p>'
    )
    if not runs:
        return note
    devices, here = [float(run.case.devices) for run in runs], float(training.case.devices)
    split = f"{training.case.trainer_devices:,} : {training.case.engine_devices:,}"

    def figure(title: str, caption: str, lines: Sequence[Curve], share: bool = False) -> str:
        return curves(title, caption, devices, lines, x_label="GPUs", share=share, log=True, marked=here)

    figures = (
        figure(
            "Days of the run",
            f"Trainer replicas and engines are scaled with their split of {split}; the batch stays. Each point is a few iterations "
            "in the middle of training, so that it differs from the figures above by some percent. Dashed, and in the legends: "
            "this run's GPUs.",
            [Curve("wall time", [run.wall / 86400 for run in runs])],
        ),
        figure(
            "Tokens per second and GPU",
            "Falls when more GPUs share one batch: shorter steps with the same fixed times, and engines with few sequences.",
            [
                Curve("trained", [run.per_second(lambda window: window.trained_tokens) for run in runs]),
                Curve(
                    "generated",
                    [run.per_second(lambda window: window.generated_tokens) for run in runs],
                    "orange",
                ),
            ],
        ),
        figure(
            "Idle",
            "Share of the time without work. Trainer and engines idle in turn in synchronous mode.",
            [
                Curve("trainer", [run.over_run(lambda window: window.trainer_idle) for run in runs]),
                Curve("engines", [run.over_run(lambda window: window.engine_idle) for run in runs], "orange"),
            ],
            share=True,
        ),
    )
    return f'<div class="grid">{"".join(figures)}</div>{note}'


def _over_training(training: Training) -> str:
    windows = training.windows
    if len(windows) == 1:
        return (
            '<p class="absent">The assumed response length is the same throughout; --response-start and --response-end let it '
            "grow.</p>"
        )
    last = training.case.config.iterations
    at = [window.progress * (last - 1) + 1 for window in windows]

    def figure(title: str, caption: str, lines: Sequence[Curve], share: bool = False) -> str:
        return curves(title, caption, at, lines, x_label="iteration", share=share)

    figures = (
        figure(
            "Response length",
            "Mean of the responses trained on, tokens.",
            [Curve("mean", [w.mean_length for w in windows])],
        ),
        figure(
            "Minutes per iteration",
            "Without evaluations and checkpoints.",
            [Curve("time", [w.seconds / 60 for w in windows])],
        ),
        figure(
            "Idle",
            "Share of the time without work.",
            [
                Curve("trainer", [window.trainer_idle for window in windows]),
                Curve("engines", [window.engine_idle for window in windows], "orange"),
            ],
            share=True,
        ),
    )
    return f'<div class="grid">{"".join(figures)}</div>'


def _assumptions(training: Training, operation: Operation, basis: Basis) -> str:
    assumed: list[Row] = [
        (f"--{name.replace('_', '-')}", "not given" if value is None else f"{value:,g}")
        for name, value in vars(training.case.assumptions).items()
    ]
    law = training.case.workload().response
    lengths = f"At the end of training responses have {law.mean:,.0f} tokens on average, and {law.cut:.1%} are cut at {law.limit:,}."
    calibrated = f"Calibrated on: {'; '.join(sorted(basis.sources)) or 'nothing'}."
    unknown = f"Not calibrated: {', '.join(sorted(basis.not_calibrated)) or 'nothing'}."
    items = "".join(f"<li>{escape(text)}</li>" for text in (lengths, *LEFT_OUT, calibrated, unknown))
    return f"{html_table(('option', 'value'), [*assumed, *operation_rows(operation)])}<ul>{items}</ul>"
