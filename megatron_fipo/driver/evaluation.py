"""Held-out accuracy with the same engines that sample for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from megatron_fipo.config import EvaluationConfig
from megatron_fipo.driver.all_wrong import WrongResponse
from megatron_fipo.driver.evaluation_metrics import EvaluatedResponse, evaluation_values, over_sets
from megatron_fipo.driver.rollout.prompt_group import GroupRequest, Response, generation_request, request_seed
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError, logs_place
from megatron_fipo.scorer.protocol import ScoreRequest
from megatron_fipo.tasks.task import Decode, HeldOut, Problem, Score

Generate = Callable[[Sequence[GroupRequest]], Sequence[Generation | None]]
"""Answers the requests of all groups in their order; None for a request that failed permanently."""
ScoreGroups = Callable[[Sequence[ScoreRequest]], Sequence[list[Score] | None]]
"""Scores groups in their order; None for one with a response that could not be scored."""
Scored = tuple[ScoreRequest, list[Score]]
"""A problem's responses and their scores."""


SHOWN_CHARACTERS = 1000
"""Of a ground truth in each row of the table: that of a code problem may take megabytes."""


@dataclass(frozen=True)
class Evaluation:
    values: dict[str, float]
    """`evaluation/...` metrics."""
    table: list[dict[str, Any]]
    """One row per response: set, problem, answer, ground truth, accuracy, length, text."""

    @property
    def all_wrong(self) -> str | None:
        """A sentence with an example if no response is right; None if one is."""
        if any(row["accuracy"] > 0 for row in self.table):
            return None
        last = self.table[-1]
        example = WrongResponse(
            last["problem_id"],
            last["ground_truth"],
            last["response"],
            last["answer"],
            last["finish_reason"] == "length",
        )
        return f"none of the {len(self.table)} held-out responses is right; {example}"


def evaluate(
    generate: Generate,
    score: ScoreGroups,
    sets: HeldOut,
    decode: Decode,
    settings: EvaluationConfig,
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    seed: int,
) -> Evaluation:
    """Sample every problem of every set `samples_per_problem` times, by the settings of its set, and score.

    All sets are sampled together. The seeds are the same at each evaluation of a run, and do not depend on the sets.
    `max_new_tokens` is the limit of problems whose set has none of its own.
    A problem with a request that failed permanently or a response that could not be scored is excluded and counted
    (`failed`), never scored as wrong. Raises `UserError` if that leaves a set without problems.
    """
    set_names, groups = [], []
    for name, problems in sets.items():
        k = settings.samples_of(name)
        for index, problem in enumerate(problems):
            set_names.append(name)
            sampling = _sampling(settings, name, problem.task.max_response_length or max_new_tokens, stop)
            groups.append(GroupRequest(problem, _requests(name, index, problem, k, seed), sampling))
    answers = iter(generate(groups))
    to_score = []
    for key, group in enumerate(groups):
        generations = list(islice(answers, len(group.requests)))
        responses = [Response.of(answer).to_score() for answer in generations if answer is not None]
        if len(responses) == len(group.requests):
            to_score.append(ScoreRequest(key, group.problem, tuple(responses)))
    scored: dict[str, list[Scored]] = {name: [] for name in sets}
    for request, scores in zip(to_score, score(to_score), strict=True):
        if scores is not None:
            scored[set_names[request.key]].append((request, scores))
    return Evaluation(
        over_sets({name: _values(name, scored[name], len(problems)) for name, problems in sets.items()}),
        [
            row
            for name in sets
            for request, scores in scored[name]
            for row in _rows(name, request, scores, decode)
        ],
    )


def _sampling(settings: EvaluationConfig, name: str, limit: int, stop: tuple[str, ...]) -> SamplingParams:
    """The sampling of the set `name`: what it does not give is that of all sets."""
    of_all, of_set = SamplingParams.of(settings, limit, stop), settings.sets.get(name)
    own = {key: getattr(of_set, key, None) for key in ("temperature", "top_p", "top_k", "min_p")}
    return replace(of_all, **{key: value for key, value in own.items() if value is not None})


def _requests(set_name: str, index: int, problem: Problem, k: int, seed: int) -> list[GenerationRequest]:
    """k requests for problem `index` of a set."""
    return [
        generation_request(
            problem,
            f"evaluation-{set_name}-{index}/{sample}",
            request_seed(seed, f"evaluation-{index}/{sample}"),
        )
        for sample in range(k)
    ]


def _values(name: str, scored: Sequence[Scored], problems: int) -> dict[str, float]:
    """The metrics of one set of so many problems."""
    if not scored:
        raise UserError(
            f"every one of the {problems} problems of the evaluation set {name} had a request that failed or a response "
            f"that could not be scored; see {logs_place()}"
        )
    values = evaluation_values([_evaluated(request, scores) for request, scores in scored])
    return values | {"failed": float(problems - len(scored))}


def _evaluated(request: ScoreRequest, scores: Sequence[Score]) -> list[EvaluatedResponse]:
    return [
        EvaluatedResponse(
            score.answer,
            score.accuracy,
            response.sampled_tokens,
            response.finish_reason == "length",
            score.extra,
        )
        for response, score in zip(request.responses, scores, strict=True)
    ]


def _rows(name: str, request: ScoreRequest, scores: Sequence[Score], decode: Decode) -> list[dict[str, Any]]:
    """The rows of `Evaluation.table` for the responses to one problem of a set."""
    return [
        {
            "set": name,
            "problem_id": request.problem.problem_id,
            "prompt": request.problem.prompt_text,
            "ground_truth": request.problem.ground_truth[:SHOWN_CHARACTERS],
            "answer": score.answer,
            "accuracy": score.accuracy,
            "length": response.sampled_tokens,
            "finish_reason": response.finish_reason,
            "response": decode(response.token_ids),
        }
        for response, score in zip(request.responses, scores, strict=True)
    ]
