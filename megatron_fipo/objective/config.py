"""The settings of the policy loss: meaning, range and default of each, in one place.

`ObjectiveConfig` is the section `objective` of a run's YAML file, the argument of `policy_loss` and, under the name
`FIPOConfig`, the argument of `fipo_loss`.
"""

import math
from dataclasses import dataclass

from megatron_fipo.fields import check, choice, number

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before they are exponentiated; beyond, the gradient is 0."""
NO_CLIP = (0.0, 10.0)
"""What `influence_clip=None` means: the authors' code still caps the weight at 10."""
SAFE_INFLUENCE = (0.8, 1.0)
"""Range of the influence weight if the safety rule applies."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The policy loss. `docs/algorithm.md` derives each term. Defaults are the 32B recipe."""

    name: str = choice("fipo", "dapo", "grpo")
    """`fipo` weights each token by its FutureKL. `dapo` is the same with weight 1 and without the drop rule.
    `grpo` is `dapo` with the mean over responses and a ratio clipped symmetrically at clip_low."""
    half_life: float = number(32.0, above=0, finite=False)
    """Tokens after which a future log-ratio counts half (the paper's tau); .inf for no decay."""
    influence_clip: tuple[float, float] | None = (1.0, 1.2)
    """Lowest and highest influence weight; null is the authors' `no clip`, which is [0, 10]."""
    safety_threshold: float = number(10.0, above=0)
    """If the advantage is negative and the ratio is above this, the influence weight is kept within [0.8, 1]."""
    clip_low: float = number(0.2, least=0, below=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = number(0.28, above=0)
    """The ratio is clipped above at 1 + clip_high (grpo: at 1 + clip_low)."""
    dual_clip: float = number(10.0, above=1)
    """The paper's c: bound of the loss on negative advantages, and the ratio above which a token leaves FutureKL."""
    filter_future_kl: bool = True
    """Exclude tokens with a ratio above dual_clip from FutureKL, whatever their advantage (the paper's M_k). false is the
    paper's ablation without the filter; the dual clip and the drop rule do not change."""
    drop_dual_clipped: bool = True
    """Drop a response with more than one token of negative advantage and ratio above dual_clip (fipo only)."""
    normalization: str = choice("token_mean", "response_mean", "reference_micro_batch")
    """`token_mean` is the mean over the kept tokens of the mini-batch, and `response_mean` that over its kept responses of the
    mean of each, which `grpo` always uses; the parallel layout changes neither. `reference_micro_batch` averages the tokens
    of each micro-batch alone, as the authors' release does (not grpo)."""
    kl_coefficient: float = number(0.0, least=0)
    """Weight of the k3 estimate of KL(policy || initial model) (grpo only)."""
    entropy_coefficient: float = number(0.0, least=0)
    """Weight of an entropy bonus. 0 needs no memory for its gradient."""
    correction: str = choice("none", "tis", "mis")
    """Off-policy correction by w = exp(old log-prob of the trainer - log-prob of the rollout engine), per token: `tis`
    multiplies the token's policy loss by min(w, correction_cap), `mis` by w if w <= correction_cap and by 0 otherwise."""
    correction_cap: float = number(2.0, above=0, finite=False)
    """Largest importance weight. The reported share of capped tokens refers to it under any correction."""

    def __post_init__(self) -> None:
        check(self)
        if self.influence_clip is not None:
            bounds = tuple(self.influence_clip)
            object.__setattr__(self, "influence_clip", bounds)  # hashable if a list was given
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < float("inf"):
                raise ValueError(
                    f"influence_clip must be two non-decreasing numbers from 0 on, such as [1.0,1.2], or null, not {bounds}"
                )
        if not self.dual_clip > self.ratio_bounds[1]:
            key = "clip_low" if self.name == "grpo" else "clip_high"
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1 + {key} = {self.ratio_bounds[1]}")
        if self.kl_coefficient and self.name != "grpo":
            raise ValueError(
                f"kl_coefficient={self.kl_coefficient} is for grpo only, and {self.name} has no KL term; set it to 0"
            )
        if self.depends_on_packing and self.name == "grpo":
            raise ValueError(
                f"normalization={self.normalization} is not for grpo, which averages per response; set response_mean"
            )

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """Lowest and highest influence weight, `influence_clip=None` resolved."""
        if self.influence_clip is None:
            return NO_CLIP
        return self.influence_clip

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio of the clipped surrogate."""
        return 1.0 - self.clip_low, 1.0 + (self.clip_low if self.name == "grpo" else self.clip_high)

    @property
    def weights_tokens(self) -> bool:
        """Whether influence weights may differ from 1."""
        return self.name == "fipo"

    @property
    def future_kl_limit(self) -> float:
        """Largest log-ratio that enters FutureKL; infinity without the filter."""
        return math.log(self.dual_clip) if self.filter_future_kl else math.inf

    @property
    def corrects(self) -> bool:
        """Whether the loss needs the rollout engine's log-probs."""
        return self.correction != "none"

    @property
    def drops(self) -> bool:
        """Whether the drop rule applies."""
        return self.name == "fipo" and self.drop_dual_clipped

    @property
    def unit(self) -> str:
        """What the denominator of the loss counts: kept_tokens, kept_sequences, or sequences (dropped ones included)."""
        if self.depends_on_packing:
            return "sequences"
        by_response = self.name == "grpo" or self.normalization == "response_mean"
        return "kept_sequences" if by_response else "kept_tokens"

    @property
    def depends_on_packing(self) -> bool:
        """Whether the gradient depends on which responses share a micro-batch."""
        return self.normalization == "reference_micro_batch"
