"""Held-out accuracy from several responses per problem: avg@k, cons@k, pass@k and lengths. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import fmean
from typing import Any

import numpy as np

from megatron_fipo.run_dir.evaluation_names import evaluation_metric
from megatron_fipo.tasks.named_numbers import means
from megatron_fipo.tasks.task import NO_ANSWER


@dataclass(frozen=True)
class EvaluatedResponse:
    """What the metrics need of one response."""

    answer: str
    """The extracted answer, or `NO_ANSWER`."""
    accuracy: float
    """1 for a right response, 0 for a wrong one."""
    length: int
    """Response tokens that were sampled."""
    truncated: bool
    """Cut at the response limit."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Of its score."""


def evaluation_values(problems: Sequence[Sequence[EvaluatedResponse]]) -> dict[str, float]:
    """Metrics over problems with k responses each, the same k for all. Accuracies are means over problems.

    `avg_at_k`: share of right responses. `cons_at_k`: see `consensus`. `pass_at_k`: share of problems with a right response.
    `length_q25`, `length_mean`, `length_median`, `length_q75` in tokens and `truncated`, the share of cut responses, are over
    all responses. `k` and `problems` are the numbers of responses and problems. The others are the named numbers of rewards,
    each over the responses that have it.
    Raises ValueError without responses or for unequal numbers of them.
    """
    counts = {len(responses) for responses in problems}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"every problem must have the same number of responses, at least one, but the numbers are {sorted(counts)}"
        )
    k = counts.pop()
    right = [sum(response.accuracy > 0 for response in responses) for responses in problems]
    everything = [response for responses in problems for response in responses]
    q25, median, q75 = np.quantile([response.length for response in everything], [0.25, 0.5, 0.75]).tolist()
    return means(response.extra for response in everything) | {
        "avg_at_k": float(np.mean(right)) / k,
        "cons_at_k": float(np.mean([consensus(responses) for responses in problems])),
        "pass_at_k": float(np.mean([pass_at(k, k, count) for count in right])),
        "length_q25": q25,
        "length_mean": float(np.mean([response.length for response in everything])),
        "length_median": median,
        "length_q75": q75,
        "truncated": float(np.mean([response.truncated for response in everything])),
        "k": float(k),
        "problems": float(len(problems)),
    }


def over_sets(sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of an evaluation by name, from those of each set (`evaluation_values`, and `failed`).

    `evaluation/SET/NAME` is of one set. `evaluation/NAME` is the mean over the sets, each with the same weight however many
    problems it has: the average that tables of results print. `problems` and `failed` are sums. Quantiles have no mean, and
    sets of different k have none of cons@k, pass@k and k; avg@k estimates the same with any k.
    """
    metrics = {}
    same_k = len({values["k"] for values in sets.values()}) == 1
    for metric in (
        "avg_at_k",
        *(("cons_at_k", "pass_at_k", "k") if same_k else ()),
        "length_mean",
        "truncated",
    ):
        metrics[evaluation_metric(metric)] = fmean(values[metric] for values in sets.values())
    for metric in ("problems", "failed"):
        metrics[evaluation_metric(metric)] = sum(values[metric] for values in sets.values())
    for name, values in sets.items():
        metrics |= {evaluation_metric(metric, name): value for metric, value in values.items()}
    return metrics


def consensus(responses: Sequence[EvaluatedResponse]) -> float:
    """Accuracy of the answer that most responses give. Responses without an answer do not vote; 0 if none has one.

    A tie gives the mean accuracy of the tied answers: the expectation of drawing one of them, but deterministic and
    independent of the order of the responses.
    """
    votes: dict[str, list[float]] = {}
    for response in responses:
        if response.answer != NO_ANSWER:
            votes.setdefault(response.answer, []).append(response.accuracy)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(accuracies) for accuracies in votes.values() if len(accuracies) == most]))


def pass_at(n: int, k: int, right: int) -> float:
    """Unbiased estimate, from k responses of which `right` are right, that at least one of n responses is right.

    1 − C(k − right, n) / C(k, n): the share of n-subsets with a right response. Drawing with replacement instead, as the
    authors' code does, underestimates it. Raises ValueError unless 1 ≤ n ≤ k and 0 ≤ right ≤ k.
    """
    if not (1 <= n <= k and 0 <= right <= k):
        raise ValueError(f"pass@{n} cannot be estimated from {k} responses of which {right} are right")
    return 1.0 - comb(k - right, n) / comb(k, n)
