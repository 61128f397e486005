"""Numbers that rewards give with a score, by name: which they are, their names, and their means. Pure."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_fipo.field_rules import name_fault

RESERVED = frozenset(
    {
        *("mean", "avg_at_k", "cons_at_k", "pass_at_k", "k", "problems", "failed", "truncated", "seconds"),
        *("length_mean", "length_q25", "length_median", "length_q75", "problem_id", "answer"),
    }
)
"""Names of other metrics of `reward/` and `evaluation/SET/`, and of what is stored beside the numbers of a response."""


def named_numbers(extra: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values of `Score.extra`, which become metrics. Booleans are none."""
    return {name: float(value) for name, value in extra.items() if is_finite_number(value)}


def is_finite_number(value: Any) -> bool:
    """Whether it is an int or float that a float can hold, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def number_name_fault(name: str) -> str | None:
    """What is wrong with the name of a number, as the end of a sentence; None if nothing is."""
    if name in RESERVED:
        return f"must not have the name {name!r}, which another metric has"
    return name_fault(name)


def means(extras: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each named number over the responses that have it, in order of the names."""
    values: dict[str, list[float]] = {}
    for extra in extras:
        for name, value in named_numbers(extra).items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in sorted(values.items())}
