"""What a mini-step reports, on the device: sums and maxima that merge freely and are copied to the host once.

`metrics.py` lists the names and what each reported number is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.objective.metrics import MAXIMA, METRICS, SUMS, Totals


@dataclass
class Statistics:
    """float64 sums [len(SUMS)] (a mini-batch may hold more tokens than float32 can count) and maxima [len(MAXIMA)]."""

    sums: Tensor
    maxima: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "Statistics":
        """The neutral element of `merge`."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        return cls(sums, torch.full((len(MAXIMA),), -torch.inf, dtype=torch.float64, device=device))

    @classmethod
    def pack(cls, values: Mapping[str, Tensor]) -> "Statistics":
        """From one 0-d tensor per name of SUMS and MAXIMA."""
        return cls(
            torch.stack([values[name].detach().double() for name in SUMS]),
            torch.stack([values[name].detach().double() for name in MAXIMA]),
        )

    def merge(self, other: "Statistics") -> "Statistics":
        """Both together."""
        return Statistics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def reduce(self, group: dist.ProcessGroup | None = None) -> "Statistics":
        """All ranks together. Two all-reduces over `group`, none without one: a sum and a maximum of 8 bytes per entry."""
        if group is None:
            return self
        sums, maxima = self.sums.clone(), self.maxima.clone()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        return Statistics(sums, maxima)

    def tensors(self) -> dict[str, Tensor]:
        """The reported numbers as 0-d tensors, still on the device. Means over nothing are 0."""
        named = dict(zip(SUMS, self.sums.unbind(), strict=True)) | dict(
            zip(MAXIMA, self.maxima.unbind(), strict=True)
        )
        totals = Totals(named)
        return {metric.name: metric.value(totals) for metric in METRICS if metric.value is not None}

    def finalize(self) -> dict[str, float]:
        """The reported numbers on the host: the one copy of a mini-step, to be called after `reduce`."""
        both = torch.cat(
            (self.sums, self.maxima)
        ).cpu()  # then computed here: on a GPU each would be a launch
        named = Statistics(both[: len(SUMS)], both[len(SUMS) :]).tensors()
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))


def sums_over(counted: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each value [R] summed over the rows that are `counted` (bool [R]), in float64."""
    return {name: torch.where(counted, value, 0.0).sum(dtype=torch.float64) for name, value in values.items()}


def maxima_over(counted: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maximum of each value [R] over the rows that are `counted` (bool [R]); -inf over no rows."""
    return {
        name: F.pad(torch.where(counted, value, -torch.inf), (0, 1), value=-torch.inf).amax()
        for name, value in values.items()
    }
