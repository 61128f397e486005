"""Sample responses whose tokens are coloured by their influence weight."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_fipo.run_dir.metrics_log import Sample, read_samples

_SHOWN_HEAD, _SHOWN_TAIL = 600, 200
"""Tokens shown of a response longer than both together: its beginning and its end."""
_LEAST_REACH = 0.02
"""Where all weights are this close to 1, the colours stay faint instead of showing rounding."""
_STRONGEST = 0.75
"""Opacity at the ends of the scale; the text stays readable over it."""


def choose_samples(run_dir: Path) -> list[Sample]:
    """A right and a wrong response (where there are both) of the first, the middle and the last iteration that have samples."""
    iterations = sorted({sample.iteration for sample in read_samples(run_dir)})
    if not iterations:
        return []
    wanted = {iterations[0], iterations[len(iterations) // 2], iterations[-1]}
    chosen: dict[tuple[int, bool], Sample] = {}
    for sample in read_samples(run_dir):
        if sample.iteration in wanted:
            chosen.setdefault((sample.iteration, not sample.accuracy > 0), sample)
    return [chosen[key] for key in sorted(chosen)]


def colour_reach(samples: Sequence[Sample]) -> float | None:
    """How far from 1 a weight has the full colour: the 98th percentile of the distance over all tokens; None without any weight."""
    distances = sorted(
        abs(w - 1.0) for sample in samples for w in sample.influence_weights or () if math.isfinite(w)
    )
    if not distances:
        return None
    return max(distances[math.ceil(0.98 * len(distances)) - 1], _LEAST_REACH)


def render_samples(samples: Sequence[Sample]) -> str:
    """The section's HTML; every text of a response is escaped."""
    if not samples:
        return '<p class="absent">This run logged no sample responses.</p>'
    reach = colour_reach(samples)
    legend = (
        _legend(reach)
        if reach is not None
        else "<p>The objective of this run has no influence weights, so tokens have no colour.</p>"
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
        "cut at the limit" if sample.finish_reason == "length" else escape(sample.finish_reason),
    )
    return (
        f'<article class="sample"><h3>Iteration {sample.iteration}</h3><p class="facts">{" · ".join(facts)}</p>'
        f'<pre class="prompt">{escape(sample.prompt)}</pre><pre class="response">{_render_tokens(sample, reach)}</pre></article>'
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
    return f'<span style="background:rgba(var(--{"up" if weight > 1.0 else "down"}),{strength:.2f})" title="{weight:.3f}">{text}</span>'


def _legend(reach: float) -> str:
    digits = 2 if reach >= 0.05 else 3
    low, high = f"{max(1.0 - reach, 0.0):.{digits}f}", f"{1.0 + reach:.{digits}f}"
    return (
        "<p>The colour of a token is its influence weight: orange tokens are followed by a future that this update made likelier, and their "
        "advantage counts more; blue ones by one it made unlikelier, and theirs counts less. Point at a token for its number.</p>"
        f'<div class="scale"><span>≤ {low}</span><span class="bar"></span><span>≥ {high}</span><span class="middle">1</span></div>'
    )
