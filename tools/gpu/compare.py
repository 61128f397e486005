"""How far a result is from the reference, and several comparisons as one row."""

import traceback
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gpu.measure import Bench
from gpu.report import FAILED, OK, Row

Errors = dict[str, float]
"""Name of a compared quantity → its error."""


def relative_norm(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64, where the reference lies; NaN counts as infinite."""
    reference = reference.detach().double()
    value = value.detach().to(reference.device).double()
    return (
        _finite((value - reference).norm() / reference.norm().clamp(min=1e-30)) if reference.numel() else 0.0
    )


def largest_difference(value: Tensor, reference: Tensor) -> float:
    """max|value − reference| / max(1, max|reference|) in float64; NaN counts as infinite."""
    reference = reference.detach().double()
    value = value.detach().to(reference.device).double()
    return (
        _finite((value - reference).abs().max() / reference.abs().max().clamp(min=1))
        if reference.numel()
        else 0.0
    )


def _finite(error: Tensor) -> float:
    return float(error.nan_to_num(nan=torch.inf))


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def within(errors: Errors, tolerances: Mapping[str, float]) -> Errors:
    """The errors, none above its tolerance; AssertionError naming those that are."""
    wrong = [
        f"{name} is off by {error:.2g} (at most {tolerances[name]:.0e})"
        for name, error in errors.items()
        if not error <= tolerances[name]
    ]
    require(not wrong, ", ".join(wrong))
    return errors


def one_row(section: str, name: str, checks: Mapping[str, Callable[[], Errors]]) -> Row:
    """Every check is run, whatever the others do: OK with the worst error of each kind, or FAILED with all that is wrong."""
    figures: dict[str, float | str] = {}
    worst: Errors = {}
    wrong = []
    for check, run in checks.items():
        try:
            errors = run()
        except Exception as error:
            traceback.print_exc()
            text = (
                str(error)
                if isinstance(error, AssertionError)
                else f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
            wrong.append(f"{check}: {text}")
            continue
        figures |= {f"{check}: {kind}": error for kind, error in errors.items()}
        worst |= {kind: max(error, worst.get(kind, 0.0)) for kind, error in errors.items()}
    if wrong:
        figures["reason"] = "; ".join(wrong)
        return Row(section, name, FAILED, "; ".join(text[:200] for text in wrong), figures, True)
    result = ", ".join(f"{kind} {error:.0e}" for kind, error in worst.items())
    return Row(section, name, OK, f"{len(checks)} x {result}" if len(checks) > 1 else result, figures, True)


def poison(bench: Bench, sizes: Mapping[torch.dtype, list[int]]) -> None:
    """Fill memory that the next call is likely to be given with NaN, so that what it leaves unwritten shows."""
    left = [
        torch.full((max(count, 1),), torch.nan, dtype=dtype, device=bench.device)
        for dtype, counts in sizes.items()
        for count in counts
        for _ in range(4)
    ]
    del left
