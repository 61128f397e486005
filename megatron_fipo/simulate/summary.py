"""The figures of a simulated run as text, for the terminal and the page."""

from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.playing import ENGINES, ITERATIONS, REPEATED, RESTARTS
from megatron_fipo.simulate.training import Training

Row = tuple[str, str]
"""A name and its value."""


def summary(training: Training) -> list[Row]:
    """The result, most important first."""
    case, config = training.case, training.case.config
    low, high = training.wall_range
    counts = training.counts()
    return [
        ("wall time", f"{days(training.wall)} ({days(low)} to {days(high)})"),
        ("GPU hours", f"{training.wall / 3600 * case.devices:,.0f}"),
        ("GPUs", f"{case.devices:,} ({case.trainer_devices:,} trainer, {case.engine_devices:,} engines)"),
        ("one iteration", duration(training.over_run(lambda window: window.seconds))),
        ("trained tokens/s/GPU", f"{training.per_second(lambda window: window.trained_tokens):,.1f}"),
        ("generated tokens/s/GPU", f"{training.per_second(lambda window: window.generated_tokens):,.1f}"),
        ("trainer idle", f"{training.over_run(lambda window: window.trainer_idle):.0%}"),
        ("engines idle", f"{training.over_run(lambda window: window.engine_idle):.0%}"),
        ("sequences at a working engine", f"{training.over_run(lambda window: window.running):,.0f}"),
        ("mean length trained on", f"{training.over_run(lambda window: window.mean_length):,.0f} tokens"),
        ("sampled tokens thrown away", f"{training.over_run(lambda window: window.dropped):.1%}"),
        ("staleness", staleness(training)),
        (
            "trainer restarts",
            f"{counts[RESTARTS]:.1f}, which repeat {counts[REPEATED]:.1f} of {config.iterations:,} iterations",
        ),
        ("engines lost", f"{counts[ENGINES]:.1f}"),
    ]


def staleness(training: Training) -> str:
    """Mean age of a response in weight versions, and shares of tokens by their age."""

    def of(name: str) -> float:
        return training.over_run(lambda window: window.staleness(name))

    return (
        f"{of('mean'):.2f} versions; tokens of age 0, 1, more: {of('tokens_age_0'):.0%}, {of('tokens_age_1'):.0%}, "
        f"{of('tokens_older'):.0%}"
    )


def time_by_cause(training: Training) -> list[tuple[str, str, str]]:
    """(cause, time, share of the wall time); they add up."""
    lost = training.lost()
    return [
        (
            cause if cause != ITERATIONS else "iterations, each once",
            duration(seconds),
            f"{seconds / training.wall:.2%}",
        )
        for cause, seconds in lost.items()
    ]


def accuracy(training: Training) -> str:
    """How exact the simulation itself is, apart from the times and assumptions that go into it."""
    iterations = sum(len(window.iterations) for window in training.windows)
    error = training.sampling_error
    known = "" if error is None else f": standard error of the iteration time {error:.1%}"
    return (
        f"{iterations} of {training.case.config.iterations:,} iterations were simulated request by request, the others are "
        f"interpolated{known}."
    )


def operation_rows(operation: Operation) -> list[Row]:
    """Its values, each with its option."""
    return [(f"--{name.replace('_', '-')}", f"{value:,g}") for name, value in vars(operation).items()]


def days(seconds: float) -> str:
    """Long times: days with one decimal, or what `duration` gives below one."""
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else duration(seconds)


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, with three digits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return (
                f"{seconds / size:,.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
            )
    return f"{seconds:.3g} s"
