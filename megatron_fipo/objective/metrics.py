"""What a mini-step reports: sums and maxima that stay on the device, merge freely, and are copied to the host once.

Every number the loss reports is a ratio of sums, a minimum or a maximum, so micro-batches, context-parallel and
data-parallel ranks merge by addition and maximum, and no number depends on how the tokens were spread.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SUMS = (
    "loss",  # the numerator that is minimised, and its denominator
    "normalizer",
    "token_mean_loss",  # the policy loss summed over kept tokens
    "reference_loss",  # the same with each micro-batch's tokens weighted by sequences / kept tokens
    "sequences",
    "dropped_sequences",
    "nonfinite_sequences",
    "tokens",
    "finite_tokens",  # tokens of sequences without a non-finite number: what the means below are over
    "kept_tokens",
    "log_ratio",
    "log_ratio_squared",
    "entropy",
    "reference_kl",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "influence",
    "influence_at_low",
    "influence_at_high",
    "influence_raw",
    "compared_tokens",  # finite tokens whose rollout log-prob is known and finite: what the numbers below are over
    "rollout_difference",  # log-prob of the trainer's old weights minus that of the rollout engine
    "rollout_difference_size",
    "rollout_k3",
    "importance",  # e^rollout_difference
    "importance_squared",
    "importance_capped",
)
MAXIMA = ("influence_max", "influence_negative_min", "rollout_difference_max")


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
        """All ranks together. Two all-reduces over `group` (sum of 224 bytes, maximum of 24 bytes); none without a group."""
        if group is None:
            return self
        sums, maxima = self.sums.clone(), self.maxima.clone()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        return Statistics(sums, maxima)

    def tensors(self) -> dict[str, Tensor]:
        """The reported numbers as 0-d tensors, still on the device. Means over nothing are 0."""
        s = dict(zip(SUMS, self.sums.unbind(), strict=True))
        highest, negative_lowest, largest_difference = self.maxima.unbind()
        tokens, compared = s["finite_tokens"], s["compared_tokens"]
        mean_log_ratio = _ratio(s["log_ratio"], tokens)
        variance = _ratio(s["log_ratio_squared"], tokens) - mean_log_ratio.square()
        token_mean = _ratio(s["token_mean_loss"], s["kept_tokens"])
        reference = _ratio(s["reference_loss"], s["sequences"])
        return {
            "policy/loss": _ratio(s["loss"], s["normalizer"]),
            "policy/loss_token_mean": token_mean,
            "policy/loss_reference_micro_batch": reference,
            "policy/normalization_gap": _ratio(
                (token_mean - reference).abs(), torch.maximum(token_mean.abs(), reference.abs())
            ),
            "policy/kl": -mean_log_ratio,
            "policy/sigma_log_ratio": variance.clamp(min=0).sqrt(),
            "policy/entropy": _ratio(s["entropy"], tokens),
            "policy/reference_kl": _ratio(s["reference_kl"], tokens),
            "policy/clip_fraction_high": _ratio(s["clipped_high"], tokens),
            "policy/clip_fraction_low": _ratio(s["clipped_low"], tokens),
            "policy/dual_clip_fraction": _ratio(s["dual_clipped"], tokens),
            "policy/sequences": s["sequences"],
            "policy/dropped_sequences": s["dropped_sequences"],
            "policy/nonfinite_sequences": s["nonfinite_sequences"],
            "policy/tokens": s["tokens"],
            "policy/kept_tokens": s["kept_tokens"],
            "influence/mean": _ratio(s["influence"], tokens),
            "influence/min": torch.where(tokens > 0, -negative_lowest, 0.0),
            "influence/max": torch.where(tokens > 0, highest, 0.0),
            "influence/share_at_low": _ratio(s["influence_at_low"], tokens),
            "influence/share_at_high": _ratio(s["influence_at_high"], tokens),
            "influence/raw_mean": _ratio(s["influence_raw"], tokens),
            "rollout/compared_tokens": compared,
            "rollout/log_prob_difference": _ratio(s["rollout_difference_size"], compared),
            "rollout/log_prob_difference_max": torch.where(compared > 0, largest_difference, 0.0),
            "rollout/kl": -_ratio(s["rollout_difference"], compared),
            "rollout/kl_k3": _ratio(s["rollout_k3"], compared),
            "rollout/effective_sample_size": _ratio(
                s["importance"].square(), compared * s["importance_squared"]
            ),
            "rollout/capped_fraction": _ratio(s["importance_capped"], compared),
        }

    def finalize(self) -> dict[str, float]:
        """The reported numbers on the host: the one copy of a mini-step, to be called after `reduce`."""
        named = self.tensors()
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))


def sums_where(counted: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each value [R] summed over the rows that are `counted` (bool [R]), in float64."""
    return {name: torch.where(counted, value, 0.0).sum(dtype=torch.float64) for name, value in values.items()}


def maxima_where(counted: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each value's [R] largest over the rows that are `counted` (bool [R]); -inf over no rows."""
    return {
        n: F.pad(torch.where(counted, v, -torch.inf), (0, 1), value=-torch.inf).amax()
        for n, v in values.items()
    }


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 over 0."""
    return numerator / torch.where(denominator == 0, 1.0, denominator)
