"""Which checkpoints of a run are kept."""

import math
from collections.abc import Sequence


def checkpoints_to_remove(
    checkpoints: Sequence[tuple[int, float | None]], keep_last: int, keep_best: int, keep_every: int
) -> list[int]:
    """Iterations of the checkpoints that the retention settings do not keep, in order.

    `checkpoints` are (iteration, held-out accuracy or None if it was not measured). Kept are the newest
    `keep_last`, at least one; the `keep_best` with the highest accuracy, of equal ones the newer; and every
    multiple of `keep_every` (0: none).
    """
    iterations = sorted(iteration for iteration, _ in checkpoints)
    measured = [
        (accuracy, iteration)
        for iteration, accuracy in checkpoints
        if accuracy is not None and not math.isnan(accuracy)
    ]
    kept = set(iterations[-max(keep_last, 1) :])
    kept.update(iteration for _, iteration in sorted(measured, reverse=True)[:keep_best])
    if keep_every:
        kept.update(iteration for iteration in iterations if iteration % keep_every == 0)
    return [iteration for iteration in iterations if iteration not in kept]
