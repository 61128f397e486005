"""The Markdown of a result. Every number in it is from the JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from tools.bench.harness import table
from tools.future_kl.correlation import ALL, RIGHT, WRONG

Row = dict[str, Any]
UNDEFINED = "–"


def render(result: dict[str, Any]) -> str:
    """From the content of `parts.json`. Columns are explained in `tools/future_kl/__main__.py`."""
    iterations = ", ".join(map(str, result["iterations"]))
    objective = result["settings"]["objective"]
    heading = (
        f"# Parts of FutureKL\n\n`{result['run']}`, iterations {iterations}, {result['mini_steps']} mini-steps each; half life "
        f"{objective['half_life']:g}, influence clip {objective['influence_clip']}; seed {result['seed']}; intervals of "
        f"{result['level']:.0%} from {result['resamples']} resamples of prompt groups."
    )
    later = [row for row in result["distance"] if row["scope"] == result["later_scope"]]
    parts = {
        "Replay": _replay(result["replay"]),
        "Spread": _spread(result["spread"]),
        f"Distance to the end, {result['later_scope']}": _distance(later),
        **_correlations(result),
        "Noise floor": _noise(result["noise"]),
        "Other log-probs in the place of the old ones": _shifts(result["samplers"]),
        "Off-policy correction": _corrections(result["samplers"]),
    }
    return "\n\n".join([heading, *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


def _replay(rows: Iterable[Row]) -> str:
    heads = ("iteration", "metric", "run", "replay")
    return table(
        heads, [(r["iteration"], f"`{r['metric']}`", f"{r['run']:.9g}", f"{r['replay']:.9g}") for r in rows]
    )


def _spread(rows: Iterable[Row]) -> str:
    heads = (
        "scope",
        "tokens",
        "std Δ",
        "mean F",
        "std F",
        "std f",
        "f at low",
        "f at high",
        "own share",
        "later share",
        "interaction",
        "own share of random signs",
    )
    return table(
        heads,
        [
            (
                r["scope"],
                f"{r['tokens']:,}",
                *_numbers(r, "log_ratio_std", "future_kl_mean", "future_kl_std", "influence_std"),
                *_percents(
                    r,
                    "at_low",
                    "at_high",
                    "own_share",
                    "later_share",
                    "interaction",
                    "own_share_of_random_signs",
                ),
            )
            for r in rows
        ],
    )


def _distance(rows: Iterable[Row]) -> str:
    heads = ("tokens to the end", "tokens", "std Δ", "mean F", "std F", "std F of random signs")
    return table(
        heads,
        [
            (
                f"{r['first']}" if r["first"] == r["last"] else f"{r['first']} to {r['last']}",
                f"{r['tokens']:,}",
                *_numbers(r, "log_ratio_std", "future_kl_mean", "future_kl_std", "std_of_random_signs"),
            )
            for r in rows
        ],
    )


def _correlations(result: dict[str, Any]) -> dict[str, str]:
    """A table for each kind of correlation, by title."""
    rows = [row for row in result["correlations"] if row["scope"] == result["later_scope"]]
    cells = {(r["covariate"], r["of"], r["responses"]): r for r in rows}
    columns = [(of, responses) for of in ("F", "f") for responses in (ALL, WRONG, RIGHT)]
    heads = ("with", *(f"{of}, {responses}" for of, responses in columns))
    return {
        f"{kind.capitalize()} correlation, {result['later_scope']}": table(
            heads,
            [
                (name, *(_interval(cells[name, of, responses][kind]) for of, responses in columns))
                for name in dict.fromkeys(row["covariate"] for row in rows)
            ],
        )
        for kind in ("pearson", "spearman")
    }


def _noise(rows: Sequence[Row]) -> str:
    heads = (
        "scope",
        "σ",
        "std of the error of F, predicted",
        "measured",
        "std F",
        "signal to noise",
        "correlation of f",
        "f moved",
        "critical σ",
    )
    lines = []
    for r in rows:
        for noise in r["by_sigma"]:
            measured = noise["measured"]
            lines.append(
                (
                    r["scope"],
                    f"{noise['sigma']:.2g}",
                    _number(noise["predicted_std"]),
                    *_numbers(
                        measured, "error_std", "future_kl_std", "signal_to_noise", "influence_correlation"
                    ),
                    _percent(measured["moved"]),
                    _number(r["critical_sigma"]),
                )
            )
    return table(heads, lines)


def _shifts(rows: Iterable[Row]) -> str:
    heads = (
        "scope",
        "log-probs of",
        "tokens",
        "std δ",
        "mean abs δ",
        "largest",
        "std F",
        "std of the error of F",
        "signal to noise",
        "correlation of f",
        "f moved",
    )
    names = ("difference_std", "difference_mean_size", "difference_max", "future_kl_std", "error_std")
    return table(
        heads,
        [
            (
                r["scope"],
                r["sampler"],
                f"{r['tokens']:,}",
                *_numbers(r, *names, "signal_to_noise", "influence_correlation"),
                _percent(r["moved"]),
            )
            for r in rows
        ],
    )


def _corrections(rows: Iterable[Row]) -> str:
    heads = (
        "scope",
        "sampled by",
        "cap",
        "mean factor, tis",
        "mean factor, mis",
        "beyond the cap",
        "effective sample size",
    )
    return table(
        heads,
        [
            (
                r["scope"],
                r["sampler"],
                f"{r['cap']:g}",
                f"{r['tis_mean']:.5f}",
                f"{r['mis_mean']:.5f}",
                *_percents(r, "beyond_cap", "effective_sample_size"),
            )
            for r in rows
        ],
    )


def _interval(found: Row) -> str:
    if found["value"] is None:
        return UNDEFINED
    if found["low"] is None:
        return f"{found['value']:+.3f}"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _numbers(row: Row, *names: str) -> list[str]:
    return [_number(row[name]) for name in names]


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3g}"


def _percents(row: Row, *names: str) -> list[str]:
    return [_percent(row[name]) for name in names]


def _percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2%}"
