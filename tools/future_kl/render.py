"""The Markdown of a result. Every number in it is from the JSON."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tools.bench.harness import table
from tools.future_kl.correlation import ALL, RIGHT, WRONG

Row = dict[str, Any]
Cell = Callable[[Row], str]
UNDEFINED = "–"


def _number(name: str) -> Cell:
    return lambda row: UNDEFINED if row[name] is None else f"{row[name]:.3g}"


def _percent(name: str) -> Cell:
    return lambda row: UNDEFINED if row[name] is None else f"{row[name]:.2%}"


def _as(name: str, form: str = "") -> Cell:
    return lambda row: format(row[name], form)


REPLAY: dict[str, Cell] = {
    "iteration": _as("iteration"),
    "metric": lambda row: f"`{row['metric']}`",
    "run": _as("run", ".9g"),
    "replay": _as("replay", ".9g"),
}
SPREAD: dict[str, Cell] = {
    "scope": _as("scope"),
    "tokens": _as("tokens", ","),
    "std Δ": _number("log_ratio_std"),
    "mean F": _number("future_kl_mean"),
    "std F": _number("future_kl_std"),
    "std f": _number("influence_std"),
    "f at low": _percent("at_low"),
    "f at high": _percent("at_high"),
    "own share": _percent("own_share"),
    "later share": _percent("later_share"),
    "interaction": _percent("interaction"),
    "own share of random signs": _percent("own_share_of_random_signs"),
}
DISTANCE: dict[str, Cell] = {
    "tokens to the end": lambda row: " to ".join(dict.fromkeys((str(row["first"]), str(row["last"])))),
    "tokens": _as("tokens", ","),
    "std Δ": _number("log_ratio_std"),
    "mean F": _number("future_kl_mean"),
    "std F": _number("future_kl_std"),
    "std F of random signs": _number("std_of_random_signs"),
}
NOISE: dict[str, Cell] = {
    "scope": _as("scope"),
    "σ": _as("sigma", ".2g"),
    "std of the error of F, predicted": _number("predicted_std"),
    "measured": _number("error_std"),
    "std F": _number("future_kl_std"),
    "signal to noise": _number("signal_to_noise"),
    "correlation of f": _number("influence_correlation"),
    "f moved": _percent("moved"),
    "critical σ": _number("critical_sigma"),
}
SHIFTS: dict[str, Cell] = {
    "scope": _as("scope"),
    "log-probs of": _as("sampler"),
    "tokens": _as("tokens", ","),
    "std δ": _number("difference_std"),
    "mean abs δ": _number("difference_mean_size"),
    "largest": _number("difference_max"),
    "std F": _number("future_kl_std"),
    "std of the error of F": _number("error_std"),
    "signal to noise": _number("signal_to_noise"),
    "correlation of f": _number("influence_correlation"),
    "f moved": _percent("moved"),
}
CORRECTIONS: dict[str, Cell] = {
    "scope": _as("scope"),
    "sampled by": _as("sampler"),
    "cap": _as("cap", "g"),
    "mean factor, tis": _as("tis_mean", ".5f"),
    "mean factor, mis": _as("mis_mean", ".5f"),
    "beyond the cap": _percent("beyond_cap"),
    "effective sample size": _percent("effective_sample_size"),
}


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
    noise = [row | of | of["measured"] for row in result["noise"] for of in row["by_sigma"]]
    parts = {
        "Replay": _rows(REPLAY, result["replay"]),
        "Spread": _rows(SPREAD, result["spread"]),
        f"Distance to the end, {result['later_scope']}": _rows(DISTANCE, later),
        **_correlations(result),
        "Noise floor": _rows(NOISE, noise),
        "Other log-probs in the place of the old ones": _rows(SHIFTS, result["samplers"]),
        "Off-policy correction": _rows(CORRECTIONS, result["samplers"]),
    }
    return "\n\n".join([heading, *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


def _rows(columns: Mapping[str, Cell], rows: Iterable[Row]) -> str:
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


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


def _interval(found: Row) -> str:
    if found["value"] is None:
        return UNDEFINED
    if found["low"] is None:
        return f"{found['value']:+.3f}"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
