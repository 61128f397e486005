"""Time that remains visible of work that runs beside other work."""

from megatron_fipo.plan.estimate import Estimate


def exposed(work: Estimate, beside: Estimate) -> Estimate:
    """How much longer `work` takes than `beside`, which runs at the same time; zero if it does not.

    `beside + exposed(work, beside)` is the larger of the two, in value and, as far as the interval allows, in its bounds.
    """
    value = max(0.0, work.value - beside.value)
    low, high = max(0.0, work.low - beside.low), max(0.0, work.high - beside.high)
    return Estimate(
        value,
        min(low, value),
        max(high, value),
        work.sources | beside.sources,
        work.not_calibrated | beside.not_calibrated,
    )
