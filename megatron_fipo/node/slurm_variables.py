"""Numbers and names that Slurm sets in the environment of a job's steps."""

import re
from collections.abc import Mapping

from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import quoted

_WHOLE = re.compile(r"[0-9]{1,18}")


def whole_number(environment: Mapping[str, str], name: str) -> int:
    """The value of a variable that must be a whole number. Raises UserError."""
    value = text(environment, name)
    if not _WHOLE.fullmatch(value):
        raise UserError(
            f"{name}={quoted(value)} is not a whole number; Slurm sets it, so do not set it yourself"
        )
    return int(value)


def optional_number(environment: Mapping[str, str], name: str) -> int | None:
    """As `whole_number`; None for a variable that is absent or empty."""
    return whole_number(environment, name) if environment.get(name) else None


def text(environment: Mapping[str, str], name: str) -> str:
    """The value of a variable that Slurm sets in every step. Raises UserError if it is absent or empty."""
    value = environment.get(name)
    if not value:
        raise UserError(f"{name} is not set; run this by srun, in a job of Slurm")
    return value
