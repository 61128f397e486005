"""The panels of a report and their explanations. Pure data; `chart.py` draws it."""

from collections.abc import Sequence
from typing import get_args

from megatron_fipo.objective.metrics import METRICS
from megatron_fipo.report.cost_figures import COST
from megatron_fipo.report.panel import Band, Color, Line, Panel, Section
from megatron_fipo.report.run_data import REWARD
from megatron_fipo.run_dir.evaluation_names import evaluation_metric

COLORS: tuple[Color, ...] = ("blue", "orange", "magenta", "teal", "grey")


def loss_lines(panel: str) -> tuple[Line, ...]:
    """The metrics of the loss that name this panel in `objective/metrics.py`, in the order of the list."""
    found = [metric for metric in METRICS if metric.panel == panel]
    return tuple(Line(metric.name, metric.label, color) for metric, color in zip(found, COLORS, strict=False))


def sections(sets: Sequence[str], numbers: Sequence[str] = ()) -> tuple[Section, ...]:
    """All sections of a report: those of training, with the panels of the evaluation sets in the first.

    `numbers` are the metrics `reward/NAME` of the run, which have one panel.
    """
    first, *others = TRAINING
    reward, *panels = first.panels
    terms = (reward_terms(numbers),) if numbers else ()
    return (Section(first.title, (*held_out_panels(sets), reward, *terms, *panels)), *others)


def reward_terms(numbers: Sequence[str]) -> Panel:
    """The panel of all numbers that rewards give with their scores; dashed if there are more than colors."""
    colors: tuple[Color, ...] = get_args(Color)
    lines = (
        Line(name, name.removeprefix(REWARD), colors[index % len(colors)], dashed=index >= len(colors))
        for index, name in enumerate(numbers)
    )
    return Panel(
        "Reward terms",
        "Numbers that the reward function gives with each score, and the rewards of the terms of a sum before their weights: "
        "means over the responses trained on that have them. Healthy: the terms that you want rise, and none rises at the "
        "cost of another.",
        tuple(lines),
    )


def held_out_panels(sets: Sequence[str]) -> tuple[Panel, ...]:
    """Accuracy and length of each set, and before them accuracy over all if there are several."""
    if not sets:  # a run of an earlier version
        return (_accuracy("", None), _length("", None))
    over_all = (_accuracy(f", mean of {len(sets)} sets", None),) if len(sets) > 1 else ()
    return (*over_all, *(make(f", {name}", name) for name in sets for make in (_accuracy, _length)))


def _accuracy(suffix: str, of_set: str | None) -> Panel:
    return Panel(
        f"Held-out accuracy{suffix}",
        "Of the held-out problems. Healthy: avg@k rises. If it rises while pass@k falls, "
        "the policy only becomes more certain of what it could already solve.",
        (
            Line(evaluation_metric("avg_at_k", of_set), "avg@k"),
            Line(evaluation_metric("cons_at_k", of_set), "cons@k", "orange"),
            Line(evaluation_metric("pass_at_k", of_set), "pass@k", "teal"),
        ),
        unit="share",
    )


def _length(suffix: str, of_set: str | None) -> Panel:
    low, high = (evaluation_metric(name, of_set) for name in ("length_q25", "length_q75"))
    return Panel(
        f"Held-out response length{suffix}",
        "Tokens per response. In the paper, length and accuracy grow together: longer reasoning "
        "pays off. Length that grows without accuracy is drift.",
        (
            Line(evaluation_metric("length_mean", of_set), "mean"),
            Line(evaluation_metric("length_median", of_set), "median", "orange"),
        ),
        Band(low, high, "middle half"),
        from_zero=True,
    )


TRAINING = (
    Section(
        "Does it learn?",
        (
            Panel(
                "Training reward and accuracy",
                "Mean over the responses trained on, after groups that were all right or all wrong were "
                "filtered; the reward includes the overlong penalty. Healthy: both rise together.",
                (Line("reward/mean", "reward"), Line("accuracy/mean", "accuracy", "orange")),
            ),
            Panel(
                "Training response length",
                "Tokens per response in training. Healthy: the complete distribution moves, not only its "
                "upper quartile.",
                (
                    Line("length/mean", "mean"),
                    Line("length/median", "median", "orange"),
                    Line("length/min", "shortest", "grey", dashed=True),
                ),
                Band("length/q25", "length/q75", "middle half"),
                from_zero=True,
            ),
            Panel(
                "Truncated responses",
                "Share cut at the response limit. Healthy: a few per cent; with more, the limit, not the "
                "model, determines the length.",
                (
                    Line("rollout/truncated", "training"),
                    Line(evaluation_metric("truncated"), "held-out", "orange"),
                ),
                unit="share",
                from_zero=True,
            ),
            Panel(
                "Length-weighted advantage",
                "Σ Aᵢ·lenᵢ / Σ lenᵢ. Below 0, the longer responses of a group are the worse ones and length "
                "is discouraged; at 0 or above, length can grow.",
                (Line("advantage/length_weighted", "mean"),),
                reference=0.0,
            ),
        ),
    ),
    Section(
        "Is the policy stable?",
        (
            Panel(
                "Policy KL",
                "Mean of log π_old − log π over the mini-steps of an iteration. Healthy: small and level; a "
                "climb precedes collapse.",
                loss_lines("Policy KL"),
                reference=0.0,
            ),
            Panel(
                "Entropy",
                "Nats per token. Healthy: a slow decline that levels off; a fall to 0 ends exploration, a "
                "climb means noise.",
                loss_lines("Entropy"),
            ),
            Panel(
                "Gradient norm",
                "Before clipping, mean over mini-steps. Healthy: level, mostly below the clipping bound; "
                "spikes are single bad batches.",
                loss_lines("Gradient norm"),
            ),
            Panel(
                "Clipped tokens",
                "Share of tokens whose ratio is clipped by the policy clip (above 1+ε_high, below 1−ε_low) "
                "or bounded by the dual clip. Healthy: well under one per cent, level.",
                loss_lines("Clipped tokens"),
                unit="share",
                from_zero=True,
            ),
            Panel(
                "σ of the log-ratio, first mini-step",
                "Old and new log-probs are computed from the same weights and the same packing, so healthy "
                "is exactly 0; FutureKL multiplies this noise about fivefold.",
                loss_lines("σ of the log-ratio, first mini-step"),
                from_zero=True,
            ),
            Panel(
                "Rollout against trainer",
                "Difference between the log-probs of the rollout engine and the trainer for the same "
                "tokens. Healthy: small and level; growth means stale weights or another precision.",
                loss_lines("Rollout against trainer"),
                from_zero=True,
            ),
            Panel(
                "Excluded",
                "Responses dropped by the drop rule (more than one dual-clipped token), responses with "
                "non-finite log-probs, and optimizer steps skipped because of their gradient. Healthy: few "
                "of the first, none of the others.",
                loss_lines("Excluded"),
                from_zero=True,
            ),
            Panel(
                "Normalization gap",
                "Relative difference between the loss normalized over the complete mini-batch and the "
                "authors' mean per micro-batch: how much their normalization would depend on the packing.",
                loss_lines("Normalization gap"),
                unit="share",
                from_zero=True,
            ),
        ),
    ),
    Section(
        "What does FIPO do to the tokens?",
        (
            Panel(
                "Influence weight, mean",
                "The factor on each token's advantage: above 1 if the tokens after it became more likely. "
                "Healthy: near 1, without a trend.",
                loss_lines("Influence weight, mean"),
                reference=1.0,
            ),
            Panel(
                "Influence weight, range",
                "The lowest and the highest weight of any token. Healthy: the clip range is used; if all "
                "weights are 1, FIPO acts like DAPO.",
                loss_lines("Influence weight, range"),
                Band("influence/min", "influence/max", "all tokens", "grey"),
                reference=1.0,
            ),
            Panel(
                "Weights at a bound",
                "Share of tokens whose weight is clipped to a bound of its range. Healthy: a minority; if "
                "most tokens are at a bound, weights no longer distinguish tokens.",
                loss_lines("Weights at a bound"),
                unit="share",
                from_zero=True,
            ),
            Panel(
                "Mean of exp F before clipping",
                "The mean weight without the clip range. Healthy: near 1; orders of magnitude above it mean "
                "large steps or noise.",
                loss_lines("Mean of exp F before clipping"),
                reference=1.0,
            ),
        ),
    ),
    COST,
)
"""The sections of a report without the panels of evaluation sets."""
