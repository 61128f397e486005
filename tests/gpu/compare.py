"""How far a result is from its reference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tools.bench.harness import Bench

Errors = dict[str, float]
"""Name of a compared quantity → its error."""


def relative_norm(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64 on the reference's device; NaN counts as infinite."""
    value, reference = _doubles(value, reference)
    return (
        _finite((value - reference).norm() / reference.norm().clamp(min=1e-30)) if reference.numel() else 0.0
    )


def largest_difference(value: Tensor, reference: Tensor) -> float:
    """max|value − reference| / max(1, max|reference|) in float64; NaN counts as infinite."""
    value, reference = _doubles(value, reference)
    if not reference.numel():
        return 0.0
    return _finite((value - reference).abs().max() / reference.abs().max().clamp(min=1))


def _doubles(value: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    reference = reference.detach().double()
    return value.detach().to(reference.device).double(), reference


def _finite(error: Tensor) -> float:
    return float(error.nan_to_num(nan=torch.inf))


def require(condition: bool, what: str) -> None:
    """AssertionError with this sentence unless the condition is met; plain, because the sentence is a row of the table."""
    if not condition:
        raise AssertionError(what)


def within(errors: Errors, tolerances: Mapping[str, float]) -> None:
    """AssertionError that names every error above its tolerance."""
    wrong = [
        f"{name} is off by {error:.2g} (at most {tolerances[name]:.0e})"
        for name, error in errors.items()
        if not error <= tolerances[name]
    ]
    require(not wrong, ", ".join(wrong))


def poison(bench: Bench, sizes: Mapping[torch.dtype, list[int]]) -> None:
    """Fill memory that the next call is likely to be given with NaN, so that elements it leaves unwritten show."""
    left = [
        torch.full((max(count, 1),), torch.nan, dtype=dtype, device=bench.device)
        for dtype, counts in sizes.items()
        for count in counts
        for _ in range(4)
    ]
    del left
