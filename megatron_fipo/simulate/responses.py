"""The responses of a simulation: how long each is, and which groups are informative. Both depend on seeds and not on timing."""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from megatron_fipo.driver.rollout.prompt_group import request_seed
from megatron_fipo.engine.protocol import GenerationRequest
from megatron_fipo.plan.workload import Assumptions, Workload
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Problem, Score

PROBLEMS = 4_096
"""Prompts of different lengths of response; after them the same ones come again, with other responses."""
_DRAWS = 1 << 16
_NORMAL = [NormalDist().inv_cdf((index + 0.5) / _DRAWS) for index in range(_DRAWS)]
"""Quantiles of the standard normal distribution: a draw is one look-up by the low bits of a seed."""


@dataclass(frozen=True)
class Responses:
    """Lengths are log-normal with one factor per prompt and one per response, cut at `limit`."""

    median: float
    """Tokens, before the cut; infinite: all responses reach the limit."""
    prompt_spread: float
    """Standard deviation of the logarithm between prompts, and `response_spread` between the responses to one."""
    response_spread: float
    limit: int
    prompt_tokens: int
    informative: float
    """Share of groups that dynamic sampling keeps, whatever their lengths."""

    @classmethod
    def of(cls, work: Workload, assumed: Assumptions) -> "Responses":
        """`work` gives the median, the limit and the prompts, `assumed` what is not in it."""
        return cls(
            work.response.median,
            assumed.prompt_spread,
            assumed.response_spread,
            work.response.limit,
            max(1, round(work.prompt_tokens)),
            assumed.informative,
        )

    def length(self, request: GenerationRequest) -> int:
        """Tokens of the complete response; at least one more than the request's prefix has."""
        return max(
            self._length(_mixed(request.prompt_ids[0]), request.seed % _DRAWS), len(request.prefix) + 1
        )

    def typical(self, count: int) -> list[int]:
        """Lengths of this many responses, one per prompt, for whoever has seen a run for a while."""
        return [self._length(_mixed(index), _mixed(_mixed(index) + index)) for index in range(count)]

    def _length(self, prompt: int, response: int) -> int:
        """From the indices of the draws."""
        exponent = self.prompt_spread * _NORMAL[prompt] + self.response_spread * _NORMAL[response]
        return max(round(min(self.median * math.exp(exponent), self.limit)), 1)

    def scores(self, request: ScoreRequest) -> list[Score]:
        """In an informative group the first response is right, in any other none."""
        draw = request_seed(0, f"informative {request.key} {request.problem.problem_id}") / 2**63
        return [
            Score(0.0, float(draw < self.informative and index == 0), "")
            for index in range(len(request.responses))
        ]


@cache
def problems(prompt_tokens: int) -> list[Problem]:
    """Their prompts differ in the first token, from which `Responses.length` takes the prompt's factor."""
    rest = (0,) * (prompt_tokens - 1)
    return [Problem(str(index), (index, *rest), "", "", "") for index in range(PROBLEMS)]


def _mixed(index: int) -> int:
    """Spreads consecutive indices over the table: multiplication by an odd number permutes it (Knuth's hash)."""
    return index * 40_503 % _DRAWS
