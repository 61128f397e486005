"""The settings of the policy loss, checked when they are made."""

from dataclasses import dataclass, field

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before they are exponentiated; beyond, the gradient is 0."""
NO_CLIP = (0.0, 10.0)
"""What `influence_clip=None` means: the authors' code still caps the weight at 10."""
SAFE_INFLUENCE = (0.8, 1.0)
"""Range of the influence weight where the safety rule holds."""


@dataclass(frozen=True)
class FIPOConfig:
    """The constants of FIPO. Defaults are the 32B recipe; raises ValueError, with the offending value, for an impossible one."""

    half_life: float = 32.0
    """Tokens after which a future log-ratio counts half (the paper's τ); `math.inf` for no decay."""
    influence_clip: tuple[float, float] | None = (1.0, 1.2)
    """Lowest and highest influence weight; None is the authors' "no clip", [0, 10]."""
    safety_threshold: float = 10.0
    """Where the advantage is negative and the ratio is above this, the influence weight is kept within [0.8, 1]."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 10.0
    """The paper's c: bound of the loss on negative advantages, and the ratio above which a token leaves FutureKL."""
    drop_dual_clipped: bool = True
    """Leave out a response with more than one token of negative advantage and ratio above `dual_clip`."""
    normalization: str = "token_mean"
    """`token_mean` divides by all kept tokens; `reference_micro_batch` averages each micro-batch alone, as the authors' code."""

    def __post_init__(self) -> None:
        if self.influence_clip is not None:
            object.__setattr__(self, "influence_clip", tuple(self.influence_clip))
            bounds = self.influence_clip
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
                raise ValueError(
                    f"influence_clip must be two bounds, 0 <= low <= high, or None, not {bounds}"
                )
        if not self.half_life > 0:
            raise ValueError(f"half_life must be positive, not {self.half_life}")
        if not self.safety_threshold > 0:
            raise ValueError(f"safety_threshold must be positive, not {self.safety_threshold}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be between 0 and 1, not {self.clip_low}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high must be 0 or more, not {self.clip_high}")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")
        if self.normalization not in ("token_mean", "reference_micro_batch"):
            raise ValueError(
                f"normalization must be token_mean or reference_micro_batch, not {self.normalization!r}"
            )

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """Lowest and highest influence weight, `influence_clip=None` resolved."""
        return NO_CLIP if self.influence_clip is None else self.influence_clip


@dataclass(frozen=True)
class PolicyObjective:
    """Which loss is minimised.

    `fipo` weighs each token by its influence weight. `dapo` is the same with weight 1 and without the drop rule. `grpo` clips
    symmetrically at clip_low, averages over each response and then over responses, and may add a KL term.
    """

    name: str = "fipo"
    settings: FIPOConfig = field(default_factory=FIPOConfig)
    kl_coefficient: float = 0.0
    """Weight of the k3 estimate of KL(policy ‖ reference model); grpo only."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus; 0 needs no gradient of the entropy."""
    correction: str = "none"
    """By w = e^(old log-prob − rollout engine's log-prob): `tis` multiplies a token's policy loss by min(w, correction_cap),
    `mis` by w where w <= correction_cap and by 0 elsewhere."""
    correction_cap: float = 2.0
    """Largest importance weight. Also what the reported share of capped tokens refers to."""

    def __post_init__(self) -> None:
        if self.name not in ("fipo", "dapo", "grpo"):
            raise ValueError(f"objective must be fipo, dapo or grpo, not {self.name!r}")
        if not self.kl_coefficient >= 0:
            raise ValueError(f"kl_coefficient must be 0 or more, not {self.kl_coefficient}")
        if self.kl_coefficient and self.name != "grpo":
            raise ValueError(
                f"kl_coefficient is {self.kl_coefficient}, but {self.name} has no KL term: set it to 0 or use grpo"
            )
        if not self.entropy_coefficient >= 0:
            raise ValueError(f"entropy_coefficient must be 0 or more, not {self.entropy_coefficient}")
        if self.correction not in ("none", "tis", "mis"):
            raise ValueError(f"correction must be none, tis or mis, not {self.correction!r}")
        if not self.correction_cap > 0:
            raise ValueError(f"correction_cap must be positive, not {self.correction_cap}")

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Where the ratio is clipped."""
        clip_high = self.settings.clip_low if self.name == "grpo" else self.settings.clip_high
        return 1.0 - self.settings.clip_low, 1.0 + clip_high

    @property
    def corrects(self) -> bool:
        """Whether the loss needs the rollout engine's log-probs."""
        return self.correction != "none"

    @property
    def drops(self) -> bool:
        """Whether the drop rule is in force."""
        return self.name == "fipo" and self.settings.drop_dual_clipped

    @property
    def unit(self) -> str:
        """What the denominator of the loss counts: kept_tokens, kept_sequences, or sequences (dropped ones too)."""
        if self.name == "grpo":
            return "kept_sequences"
        return "kept_tokens" if self.settings.normalization == "token_mean" else "sequences"
