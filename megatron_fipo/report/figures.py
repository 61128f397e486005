"""Which figures a report has, and what each of them teaches. Pure data; `chart.py` draws it."""

from dataclasses import dataclass
from typing import Literal

Colour = Literal["blue", "orange", "teal", "magenta", "grey"]


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    colour: Colour = "blue"
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two metrics."""

    low: str
    high: str
    label: str
    colour: Colour = "blue"


@dataclass(frozen=True)
class Panel:
    """One small chart over iterations. A panel none of whose metrics the run has is left out."""

    title: str
    caption: str
    """What it shows, and what healthy looks like."""
    lines: tuple[Line, ...]
    band: Band | None = None
    reference: float | None = None
    """A horizontal line to compare with."""
    stacked: bool = False
    """The lines are parts of a whole and are drawn as areas on top of each other."""
    percent: bool = False
    from_zero: bool = False
    """The axis begins at 0."""


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


LEARNING = Section(
    "Does it learn?",
    (
        Panel(
            "Held-out accuracy",
            "Problems never trained on. Healthy: avg@k rises. If it rises while pass@k falls, the policy only sharpens what it could do "
            "already.",
            (
                Line("evaluation/avg_at_k", "avg@k"),
                Line("evaluation/cons_at_k", "cons@k", "orange"),
                Line("evaluation/pass_at_k", "pass@k", "teal"),
            ),
            percent=True,
        ),
        Panel(
            "Held-out response length",
            "Tokens per response. In the paper length and accuracy grow together: the model reasons longer because it pays. Length that "
            "grows alone is drift.",
            (Line("evaluation/length_mean", "mean"), Line("evaluation/length_median", "median", "orange")),
            Band("evaluation/length_q25", "evaluation/length_q75", "middle half"),
            from_zero=True,
        ),
        Panel(
            "Training reward and accuracy",
            "Mean over the responses trained on, after the filter took the groups that were all right or all wrong; the reward includes "
            "the overlong penalty. Healthy: both rise together.",
            (Line("reward/mean", "reward"), Line("accuracy/mean", "accuracy", "orange")),
        ),
        Panel(
            "Training response length",
            "Tokens per response while training. Healthy: the whole distribution moves, not only its upper quartile.",
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
            "Share cut at the response limit. Healthy: a few per cent; more means that the limit, not the model, decides.",
            (Line("rollout/truncated", "training"), Line("evaluation/truncated", "held-out", "orange")),
            percent=True,
            from_zero=True,
        ),
        Panel(
            "Length-weighted advantage",
            "Σ Aᵢ·lenᵢ / Σ lenᵢ. Below 0, longer responses are the worse ones of their group and length is discouraged; rising towards 0 "
            "or above lets it grow.",
            (Line("advantage/length_weighted", "mean"),),
            reference=0.0,
        ),
    ),
)

STABILITY = Section(
    "Is the policy stable?",
    (
        Panel(
            "Policy KL",
            "Mean of log π_old − log π over the mini-steps of an iteration. Healthy: small and level; a climb precedes collapse.",
            (Line("policy/kl", "KL"),),
            reference=0.0,
        ),
        Panel(
            "Entropy",
            "Nats per token. Healthy: a slow decline that levels off; a fall to 0 ends exploration, a climb means noise.",
            (Line("policy/entropy", "entropy"),),
        ),
        Panel(
            "Gradient norm",
            "Before clipping, mean over mini-steps. Healthy: level, mostly below the clipping bound; spikes are single bad batches.",
            (Line("policy/grad_norm", "norm"),),
        ),
        Panel(
            "Clipped tokens",
            "Share of tokens whose ratio the policy clip holds (above 1+ε_high, below 1−ε_low) or the dual clip bounds. Healthy: well "
            "under one per cent, level.",
            (
                Line("policy/clip_fraction_high", "high"),
                Line("policy/clip_fraction_low", "low", "orange"),
                Line("policy/dual_clip_fraction", "dual", "magenta"),
            ),
            percent=True,
            from_zero=True,
        ),
        Panel(
            "σ of the log-ratio, first mini-step",
            "Old and new log-probs come from the same weights and the same packing here, so healthy is exactly 0; FutureKL multiplies "
            "this noise about fivefold.",
            (Line("policy/sigma_log_ratio", "σ"),),
            from_zero=True,
        ),
        Panel(
            "Rollout against trainer",
            "How far the rollout engine's log-probs are from the trainer's for the same tokens. Healthy: small and level; growth means "
            "stale weights or another precision.",
            (Line("rollout/log_prob_difference", "difference"),),
            from_zero=True,
        ),
        Panel(
            "Left out",
            "Responses dropped by the drop rule (more than one dual-clipped token), responses with log-probs that are not finite, and whole "
            "steps skipped for their gradient. Healthy: few of the first, none of the others.",
            (
                Line("policy/dropped_sequences", "dropped"),
                Line("policy/nonfinite_sequences", "not finite", "magenta"),
                Line("policy/skipped_steps", "steps skipped", "orange"),
            ),
            from_zero=True,
        ),
        Panel(
            "Normalisation gap",
            "Relative difference between the loss normalised over the whole mini-batch and the authors' mean per micro-batch: what "
            "their normalisation would make depend on the packing.",
            (Line("policy/normalization_gap", "gap"),),
            percent=True,
            from_zero=True,
        ),
    ),
)

INFLUENCE = Section(
    "What does FIPO do to the tokens?",
    (
        Panel(
            "Influence weight, mean",
            "The factor on each token's advantage: above 1 where the tokens that follow became likelier. Healthy: near 1, without a trend.",
            (Line("influence/mean", "mean"),),
            reference=1.0,
        ),
        Panel(
            "Influence weight, range",
            "The lowest and the highest weight of any token. Healthy: the clip range is in use; a range of nothing but 1 means that FIPO "
            "acts like DAPO.",
            (Line("influence/max", "highest", "orange"), Line("influence/min", "lowest")),
            Band("influence/min", "influence/max", "all tokens", "grey"),
            reference=1.0,
        ),
        Panel(
            "Weights at a bound",
            "Share of tokens whose weight the clip range holds. Healthy: a minority; if most tokens sit at a bound, weights no longer "
            "tell tokens apart.",
            (
                Line("influence/share_at_low", "at the lower"),
                Line("influence/share_at_high", "at the upper", "orange"),
            ),
            percent=True,
            from_zero=True,
        ),
        Panel(
            "Mean of exp F before clipping",
            "How large the weights would be without the clip range. Healthy: near 1; orders of magnitude above it mean large steps or noise.",
            (Line("influence/raw_mean", "exp F"),),
            reference=1.0,
        ),
    ),
)

COST = Section(
    "What does it cost?",
    (
        Panel(
            "Time per phase",
            "Seconds of each iteration. Rollout usually dominates and grows with response length.",
            (
                Line("time/rollout", "rollout"),
                Line("time/old_log_probs", "old log-probs", "teal"),
                Line("time/update", "update", "orange"),
                Line("time/weight_sync", "weight sync", "magenta"),
                Line("time/evaluation", "evaluation", "grey"),
            ),
            stacked=True,
        ),
        Panel(
            "Groups",
            "What became of the generated groups. Those all right or all wrong teach nothing and are filtered; healthy: most are used.",
            (
                Line("groups/used", "used"),
                Line("groups/surplus", "kept for later", "teal"),
                Line("groups/all_right", "all right", "orange"),
                Line("groups/all_wrong", "all wrong", "magenta"),
                Line("groups/failed", "failed", "grey"),
            ),
            stacked=True,
        ),
        Panel(
            "Prompts",
            "Prompts that dynamic sampling needed until an iteration had its groups. Growth means that the problems have become too easy "
            "or stay too hard.",
            (Line("rollout/prompts", "prompts"),),
            from_zero=True,
        ),
        Panel(
            "Staleness",
            "Weight versions between a token's sampling and its update, mean over responses. 0 in synchronous runs that drop what is "
            "unfinished.",
            (Line("staleness/mean", "mean"), Line("staleness/max", "largest", "grey")),
            from_zero=True,
        ),
        Panel(
            "Generated tokens",
            "Response tokens per iteration: trained on, of filtered groups, and dropped because they were not needed or too old.",
            (
                Line("tokens/used", "used"),
                Line("tokens/filtered", "filtered", "orange"),
                Line("tokens/dropped", "dropped", "magenta"),
            ),
            stacked=True,
        ),
    ),
)

SECTIONS = (LEARNING, STABILITY, INFLUENCE, COST)
