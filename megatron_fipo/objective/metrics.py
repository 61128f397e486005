"""The one list of what a mini-step reports: names, meanings, sums, reductions and report panels. Pure data, no torch.

Every metric is a ratio of sums, a minimum or a maximum, so micro-batches, context-parallel and data-parallel ranks merge
by addition and maximum, and no number depends on how tokens were distributed. A new metric takes one entry in `SUMS`, one
in `METRICS`, its sum in the torch path (`loss.py`) and in the Triton path (`kernels/triton_loss.py`). Statistics, kernel
indices, the reduction over mini-steps and the report's panels derive from here; `python -m tools.metrics_table` writes
the table in docs/algorithm.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUMS = (
    "loss",  # the numerator that is minimized
    "normalizer",  # its denominator
    "token_mean_loss",  # the policy loss summed over kept tokens
    "reference_loss",  # the same with each micro-batch's tokens weighted by sequences / kept tokens
    "sequences",
    "dropped_sequences",
    "nonfinite_sequences",
    "tokens",
    "finite_tokens",  # tokens of sequences without a non-finite number: the default denominator
    "kept_tokens",
    "log_ratio",
    "log_ratio_squared",
    "entropy",
    "reference_kl",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "influence",
    "influence_at_low",
    "influence_at_high",
    "influence_raw",
    "compared_tokens",  # finite tokens whose rollout log-prob is known and finite
    "rollout_difference",  # log-prob of the trainer's old weights minus that of the rollout engine
    "rollout_difference_size",
    "rollout_k3",
    "importance",  # e^rollout_difference
    "importance_squared",
    "importance_capped",
)
"""What is added up over tokens, micro-batches and ranks, in the order of `Statistics.sums`."""
MAXIMA = ("influence_max", "influence_negative_min", "rollout_difference_max")
"""What is maximized over them, in the order of `Statistics.maxima`."""


@dataclass(frozen=True)
class Totals:
    """Merged sums and maxima by name (0-d tensors)."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def mean(self, name: str, over: str = "finite_tokens") -> Any:
        """One sum divided by another; 0 over nothing."""
        return ratio(self[name], self[over])

    def maximum(self, name: str, over: str = "finite_tokens") -> Any:
        """A maximum; 0 over nothing."""
        return self[name].where(self[over] > 0, 0.0)

    def variance(self, name: str) -> Any:
        """Variance of a per-token value whose square is summed too."""
        return self.mean(f"{name}_squared") - self.mean(name).square()


def ratio(numerator: Any, denominator: Any) -> Any:
    """numerator / denominator, and 0 over 0."""
    return numerator / denominator.where(denominator != 0, 1.0)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean over the mini-steps."""
    return sum(values) / len(values)


def first(values: Sequence[float]) -> float:
    """The first mini-step's value."""
    return values[0]


@dataclass(frozen=True)
class Metric:
    """One logged number."""

    name: str
    meaning: str
    """For the table in docs/algorithm.md."""
    value: Callable[[Totals], Any] | None
    """From the merged sums; None if the optimizer step measures it."""
    over_mini_steps: Callable[[Sequence[float]], float] = mean
    """How the values of the mini-steps of an iteration become one number: mean, sum, min, max or first."""
    panel: str = ""
    """Title of the report panel (`report/figures.py`) that draws it as a line; empty for none."""
    label: str = ""
    """Label of that line."""


def _normalization_gap(t: Totals) -> Any:
    token_mean, reference = t.mean("token_mean_loss", "kept_tokens"), t.mean("reference_loss", "sequences")
    return ratio((token_mean - reference).abs(), token_mean.abs().maximum(reference.abs()))


METRICS = (
    Metric("policy/loss", "the minimized loss", lambda t: t.mean("loss", "normalizer")),
    Metric(
        "policy/loss_token_mean",
        "policy loss, mean over the kept tokens of the mini-batch",
        lambda t: t.mean("token_mean_loss", "kept_tokens"),
    ),
    Metric(
        "policy/loss_reference_micro_batch",
        "policy loss, the authors' mean per micro-batch",
        lambda t: t.mean("reference_loss", "sequences"),
    ),
    Metric(
        "policy/normalization_gap",
        "difference of the two means, relative to the larger",
        _normalization_gap,
        panel="Normalization gap",
        label="gap",
    ),
    Metric("policy/kl", "mean −Δ", lambda t: -t.mean("log_ratio"), panel="Policy KL", label="KL"),
    Metric(
        "policy/sigma_log_ratio",
        "standard deviation of Δ; of the first mini-step, where anything but 0 is numerical noise",
        lambda t: t.variance("log_ratio").clamp(min=0).sqrt(),
        first,
        panel="σ of the log-ratio, first mini-step",
        label="σ",
    ),
    Metric(
        "policy/entropy",
        "mean entropy; 0 if not computed",
        lambda t: t.mean("entropy"),
        panel="Entropy",
        label="entropy",
    ),
    Metric(
        "policy/reference_kl",
        "mean k3 estimate of KL to the initial model; 0 if not computed",
        lambda t: t.mean("reference_kl"),
    ),
    Metric(
        "policy/clip_fraction_high",
        "share of tokens with A > 0, r > 1 + clip_high",
        lambda t: t.mean("clipped_high"),
        panel="Clipped tokens",
        label="high",
    ),
    Metric(
        "policy/clip_fraction_low",
        "share of tokens with A < 0, r < 1 − clip_low",
        lambda t: t.mean("clipped_low"),
        panel="Clipped tokens",
        label="low",
    ),
    Metric(
        "policy/dual_clip_fraction",
        "share of tokens with A < 0, r > c",
        lambda t: t.mean("dual_clipped"),
        panel="Clipped tokens",
        label="dual",
    ),
    Metric("policy/sequences", "responses", lambda t: t["sequences"], sum),
    Metric(
        "policy/dropped_sequences",
        "responses excluded by the drop rule",
        lambda t: t["dropped_sequences"],
        sum,
        panel="Excluded",
        label="dropped",
    ),
    Metric(
        "policy/nonfinite_sequences",
        "responses excluded for a non-finite number",
        lambda t: t["nonfinite_sequences"],
        sum,
        panel="Excluded",
        label="not finite",
    ),
    Metric("policy/tokens", "response tokens", lambda t: t["tokens"], sum),
    Metric("policy/kept_tokens", "response tokens in the loss", lambda t: t["kept_tokens"], sum),
    Metric(
        "policy/grad_norm",
        "global gradient norm before clipping",
        None,
        panel="Gradient norm",
        label="norm",
    ),
    Metric(
        "policy/skipped_steps",
        "optimizer steps skipped for a non-finite gradient",
        None,
        sum,
        panel="Excluded",
        label="steps skipped",
    ),
    Metric(
        "influence/mean",
        "mean f; 1 for `dapo` and `grpo`",
        lambda t: t.mean("influence"),
        panel="Influence weight, mean",
        label="mean",
    ),
    Metric(
        "influence/min",
        "lowest f of any token",
        lambda t: 0.0 - t.maximum("influence_negative_min"),  # not −0 over nothing
        min,
        panel="Influence weight, range",
        label="lowest",
    ),
    Metric(
        "influence/max",
        "highest f of any token",
        lambda t: t.maximum("influence_max"),
        max,
        panel="Influence weight, range",
        label="highest",
    ),
    Metric(
        "influence/raw_mean",
        "mean e^F before any clipping; F is capped at 20 here, since e^F may exceed float32",
        lambda t: t.mean("influence_raw"),
        panel="Mean of exp F before clipping",
        label="exp F",
    ),
    Metric(
        "influence/share_at_low",
        "share of tokens with e^F at or below the lower bound, before the safety rule",
        lambda t: t.mean("influence_at_low"),
        panel="Weights at a bound",
        label="at the lower",
    ),
    Metric(
        "influence/share_at_high",
        "share of tokens with e^F at or above the upper bound, before the safety rule",
        lambda t: t.mean("influence_at_high"),
        panel="Weights at a bound",
        label="at the upper",
    ),
    Metric(
        "rollout/compared_tokens",
        "response tokens with a finite log-prob under the engine: what the numbers below are over, under any `correction`",
        lambda t: t["compared_tokens"],
        sum,
    ),
    Metric(
        "rollout/log_prob_difference",
        "mean abs(δ), not clamped",
        lambda t: t.mean("rollout_difference_size", "compared_tokens"),
        panel="Rollout against trainer",
        label="difference",
    ),
    Metric(
        "rollout/log_prob_difference_max",
        "largest abs(δ), not clamped",
        lambda t: t.maximum("rollout_difference_max", "compared_tokens"),
        max,
    ),
    Metric(
        "rollout/kl",
        "KL(μ ‖ π_old) on the tokens that the engine sampled: mean −δ (k1)",
        lambda t: -t.mean("rollout_difference", "compared_tokens"),
    ),
    Metric(
        "rollout/kl_k3",
        "the same by mean e^δ − δ − 1 (k3, never negative)",
        lambda t: t.mean("rollout_k3", "compared_tokens"),
    ),
    Metric(
        "rollout/effective_sample_size",
        "(Σw)² / (n·Σw²), a share of the tokens; 1 if the engine agrees",
        lambda t: ratio(t["importance"].square(), t["compared_tokens"] * t["importance_squared"]),
    ),
    Metric(
        "rollout/capped_fraction",
        "share of tokens with w > `correction_cap`",
        lambda t: t.mean("importance_capped", "compared_tokens"),
    ),
)
"""In the order of the table in docs/algorithm.md."""


def over_mini_steps(mini_steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One number per metric for an iteration, from those of its mini-steps. KeyError for a name that is not in `METRICS`."""
    reductions = {metric.name: metric.over_mini_steps for metric in METRICS}
    return {name: reductions[name]([step[name] for step in mini_steps]) for name in mini_steps[0]}


def markdown_table() -> str:
    """The table of docs/algorithm.md."""
    rows = [f"| `{metric.name}` | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| name | meaning |", "|---|---|", *rows]) + "\n"
