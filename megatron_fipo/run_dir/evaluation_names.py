"""Names of the metrics of an evaluation: `evaluation/avg_at_k` over all sets, `evaluation/SET/avg_at_k` of one set.

Runs of earlier versions have the first form only.
"""

from collections.abc import Iterable

MAIN = "avg_at_k"
"""The metric by which an evaluation is judged: the mean accuracy of a response."""


def evaluation_metric(name: str, of_set: str | None = None) -> str:
    """The complete name of a metric of one set, or over all sets."""
    return f"evaluation/{name}" if of_set is None else f"evaluation/{of_set}/{name}"


def sets_in(metrics: Iterable[str]) -> list[str]:
    """The sets that have the main metric among these names, in their order."""
    parts = [name.split("/") for name in metrics]
    return [part[1] for part in parts if len(part) == 3 and (part[0], part[2]) == ("evaluation", MAIN)]
