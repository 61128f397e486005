"""Scorers by the name that `reward.name` uses. A new reward is a function with the signature of `Scorer` and a line here."""

from megatron_fipo.errors import UserError
from megatron_fipo.tasks.countdown.scorer import score_countdown
from megatron_fipo.tasks.dapo_math import score_dapo_math
from megatron_fipo.tasks.score import Scorer

SCORERS: dict[str, Scorer] = {"countdown": score_countdown, "dapo_math": score_dapo_math}


def scorer(name: str) -> Scorer:
    """The scorer called `name`; UserError names the known ones."""
    if name not in SCORERS:
        raise UserError(f"reward.name is {name!r}; choose one of {', '.join(sorted(SCORERS))}")
    return SCORERS[name]
