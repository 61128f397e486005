"""Sample responses whose tokens are colored by their influence weight."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_fipo.run_dir.metrics_log import Sample, read_samples

_SHOWN_HEAD, _SHOWN_TAIL = 600, 200
"""Tokens shown of a longer response: its first and its last ones."""
_LEAST_REACH = 0.02
"""The smallest reach: if all weights are near 1, colors remain faint instead of showing rounding."""
_STRONGEST = 0.75
"""Opacity at the ends of the scale; text remains readable on it."""


def choose_samples(run_dir: Path) -> list[Sample]:
    """Right and wrong responses to show.

    One of each, if both exist, of the first, the middle and the last iteration with samples.
    """
    iterations = sorted({sample.iteration for sample in read_samples(run_dir)})
    if not iterations:
        return []
    wanted = {iterations[0], iterations[len(iterations) // 2], iterations[-1]}
    chosen: dict[tuple[int, bool], Sample] = {}
    for sample in read_samples(run_dir):
        if sample.iteration in wanted:
            chosen.setdefault((sample.iteration, not sample.accuracy > 0), sample)
    return [chosen[key] for key in sorted(chosen)]


def color_reach(samples: Sequence[Sample]) -> float | None:
    """The distance from 1 at which a weight has the full color; None without any weight.

    The 98th percentile of the distances of all tokens.
    """
    distances = sorted(
        abs(w - 1.0) for sample in samples for w in sample.influence_weights or () if math.isfinite(w)
    )
    if not distances:
        return None
    return max(distances[math.ceil(0.98 * len(distances)) - 1], _LEAST_REACH)


def render_samples(samples: Sequence[Sample]) -> str:
    """The section as HTML; all text of responses is escaped."""
    if not samples:
        return '<p class="absent">This run logged no sample responses.</p>'
    reach = color_reach(samples)
    legend = (
        _legend(reach)
        if reach is not None
        else "<p>The objective of this run has no influence weights, so tokens have no color.</p>"
    )
    return (
        legend + f'<div class="samples">{"".join(_render_sample(sample, reach) for sample in samples)}</div>'
    )


def _render_sample(sample: Sample, reach: float | None) -> str:
    verdict = "right" if sample.accuracy > 0 else "wrong"
    facts = (
        f'<span class="{verdict}">{verdict}</span>',
        f"reward {sample.reward:+.2f}",
        f"advantage {sample.advantage:+.2f}",
        f"{len(sample.tokens):,} tokens",
        "truncated" if sample.finish_reason == "length" else escape(sample.finish_reason),
    )
    return (
        f'<article class="sample"><h3>Iteration {sample.iteration}</h3>'
        f'<p class="facts">{" · ".join(facts)}</p>'
        f'<pre class="prompt">{escape(sample.prompt)}</pre>'
        f'<pre class="response">{_render_tokens(sample, reach)}</pre></article>'
    )


def _render_tokens(sample: Sample, reach: float | None) -> str:
    weights: Sequence[float | None] = sample.influence_weights or [None] * len(sample.tokens)
    pieces = [
        _render_token(token, weight, reach) for token, weight in zip(sample.tokens, weights, strict=True)
    ]
    hidden = len(pieces) - _SHOWN_HEAD - _SHOWN_TAIL
    if hidden > 0:
        pieces[_SHOWN_HEAD:-_SHOWN_TAIL] = [f'<span class="cut"> … {hidden:,} tokens not shown … </span>']
    return "".join(pieces)


def _render_token(token: str, weight: float | None, reach: float | None) -> str:
    text = escape(token)
    if weight is None or reach is None:
        return text
    if not math.isfinite(weight):
        return f'<span title="not finite">{text}</span>'
    strength = min(abs(weight - 1.0) / reach, 1.0) * _STRONGEST
    if strength < 0.01:
        return f'<span title="{weight:.3f}">{text}</span>'
    color = f"rgba(var(--{'up' if weight > 1.0 else 'down'}),{strength:.2f})"
    return f'<span style="background:{color}" title="{weight:.3f}">{text}</span>'


def _legend(reach: float) -> str:
    digits = 2 if reach >= 0.05 else 3
    low, high = f"{max(1.0 - reach, 0.0):.{digits}f}", f"{1.0 + reach:.{digits}f}"
    return (
        "<p>The color of a token is its influence weight. Orange: the update made the tokens after it more "
        "likely, and its advantage is scaled up. Blue: the update made them less likely, and its advantage "
        "is scaled down. Point at a token to see its weight.</p>"
        f'<div class="scale"><span>≤ {low}</span><span class="bar"></span><span>≥ {high}</span>'
        '<span class="middle">1</span></div>'
    )
