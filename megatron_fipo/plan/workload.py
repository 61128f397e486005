"""What a plan cannot read from a configuration: how long responses are, and how many of them are informative."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

from megatron_fipo.fields import check, number

QUANTILES = 512
"""Points at which a length law is evaluated."""


@dataclass(frozen=True)
class Assumptions:
    """Assumed, not measured; printed with every plan. A run's own metrics replace them."""

    prompt_tokens: float | None = number(None, above=0)
    """Mean length of a prompt, in tokens; not given: 160, as in DAPO-Math-17k, or rollout.max_prompt_length if that is less."""
    response_start: float | None = number(None, above=0)
    """Mean response length at the start of training, in tokens; not given: the length at the end."""
    response_end: float | None = number(None, above=0)
    """Mean response length at the end of training; not given: 45 % of rollout.max_response_length. A plan of one iteration
    is made for this length."""
    prompt_spread: float = number(0.5, least=0, most=3)
    """Standard deviation of the logarithm of length between prompts."""
    response_spread: float = number(0.5, least=0, most=3)
    """Standard deviation of the logarithm of length between responses to one prompt."""
    informative: float = number(0.4, above=0, most=1)
    """Share of groups that dynamic sampling keeps: neither all right nor all wrong."""
    evaluation_problems: int = number(30, least=1, most=1_000_000)
    """Problems of each held-out set (30 in AIME)."""
    expert_load: float | None = number(None, least=1)
    """Tokens that the fullest expert-parallel rank gets over the mean of the ranks, for a mixture of experts; not given:
    1.2."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LengthLaw:
    """Response lengths: log-normal, cut at `limit`, with a given mean after the cut."""

    mean: float
    """Tokens, after the cut; at most `limit`."""
    spread: float
    """Standard deviation of the logarithm before the cut."""
    limit: int

    @cached_property
    def median(self) -> float:
        """Of the law before the cut, found by bisection; infinite if the mean is the limit."""
        if self.spread == 0 or self.mean >= self.limit:
            return self.mean if self.mean < self.limit else math.inf
        low, high = 0.0, float(self.limit) * 1e6
        for _ in range(200):
            middle = (low + high) / 2
            if self._mean(middle) < self.mean:
                low = middle
            else:
                high = middle
        return high

    @cached_property
    def quantiles(self) -> tuple[float, ...]:
        """Lengths at the middles of `QUANTILES` equal shares of responses, ascending."""
        normal = NormalDist()
        return tuple(
            min(self.limit, self.median * math.exp(self.spread * normal.inv_cdf((index + 0.5) / QUANTILES)))
            for index in range(QUANTILES)
        )

    @property
    def second_moment(self) -> float:
        """Mean of the squared length."""
        return sum(length * length for length in self.quantiles) / QUANTILES

    @property
    def cut(self) -> float:
        """Share of responses that reach the limit."""
        return sum(length >= self.limit for length in self.quantiles) / QUANTILES

    def _mean(self, median: float) -> float:
        """E[min(X, limit)] of a log-normal X: the closed form with two normal distribution functions."""
        normal, spread = NormalDist(), self.spread
        edge = (math.log(self.limit / median)) / spread if median > 0 else math.inf
        below = median * math.exp(spread * spread / 2) * normal.cdf(edge - spread)
        return below + self.limit * (1 - normal.cdf(edge))


@lru_cache(maxsize=256)
def length_law(mean: float, spread: float, limit: int) -> LengthLaw:
    """The law of these numbers, made once: its quantiles take milliseconds and a search asks for them thousands of times."""
    return LengthLaw(mean, spread, limit)


@dataclass(frozen=True)
class Workload:
    """The responses of one iteration."""

    prompt_tokens: float
    response: LengthLaw
    informative: float
    trained: int
    """Responses trained on."""
    sampled: int
    """Responses completed by the engines: `trained / informative`, at most those of `rollout.max_prompts`."""

    @property
    def trained_tokens(self) -> float:
        """Tokens that the trainer computes: prompts and responses."""
        return self.trained * (self.prompt_tokens + self.response.mean)

    @property
    def held_tokens(self) -> float:
        """Tokens that a running response holds in the cache, on average over its steps.

        A response of length L is met in proportion to L and is at its middle: prompt + E[L²] / (2 E[L]).
        """
        return self.prompt_tokens + self.response.second_moment / (2 * self.response.mean)

    @property
    def mean_square(self) -> float:
        """Mean of the squared length of prompt and response."""
        prompt = self.prompt_tokens
        return prompt * prompt + 2 * prompt * self.response.mean + self.response.second_moment
