"""Held-out accuracy with the same engines that sample for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config import EvaluationConfig
from megatron_fipo.driver.all_wrong import WrongResponse
from megatron_fipo.driver.evaluation_metrics import EvaluatedResponse, evaluation_values
from megatron_fipo.driver.rollout.prompt_group import request_seed
from megatron_fipo.engine.protocol import Generation, GenerationRequest, SamplingParams
from megatron_fipo.errors import UserError, ray_logs
from megatron_fipo.scorer.protocol import FinishedResponse, ScoreRequest
from megatron_fipo.tasks.task import Decode, Problem, Score

Generate = Callable[[Sequence[GenerationRequest], SamplingParams], Sequence[Generation | None]]
"""Answers requests in their order; None for a request that failed permanently."""
ScoreGroups = Callable[[Sequence[ScoreRequest]], Sequence[list[Score] | None]]
"""Scores groups in their order; None for one with a response that could not be scored."""


@dataclass(frozen=True)
class Evaluation:
    values: dict[str, float]
    """`evaluation/...` metrics."""
    table: list[dict[str, Any]]
    """One row per response: problem, answer, ground truth, accuracy, length, text."""

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
    problems: Sequence[Problem],
    decode: Decode,
    settings: EvaluationConfig,
    *,
    max_new_tokens: int,
    seed: int,
) -> Evaluation:
    """Sample every problem `samples_per_problem` times and score. The seeds are the same at each evaluation of a run.

    A problem with a request that failed permanently or a response that could not be scored is excluded and counted
    (`evaluation/failed`), never scored as wrong.
    """
    k = settings.samples_per_problem
    requests = [
        GenerationRequest(
            f"evaluation-{index}/{sample}",
            problem.prompt_ids,
            request_seed(seed, f"evaluation-{index}/{sample}"),
        )
        for index, problem in enumerate(problems)
        for sample in range(k)
    ]
    answers = generate(requests, SamplingParams(settings.temperature, settings.top_p, max_new_tokens))
    to_score = []
    for index, problem in enumerate(problems):
        generations = [answer for answer in answers[index * k : (index + 1) * k] if answer is not None]
        if len(generations) == k:
            responses = (
                FinishedResponse(answer.response_ids, answer.finish_reason) for answer in generations
            )
            to_score.append(ScoreRequest(index, problem, tuple(responses)))
    scored = [
        (request, scores)
        for request, scores in zip(to_score, score(to_score), strict=True)
        if scores is not None
    ]
    if not scored:
        raise UserError(
            f"every one of the {len(problems)} evaluation problems had a request that failed or a response that could "
            f"not be scored; see {ray_logs()}"
        )
    values = evaluation_values([_evaluated(request, scores) for request, scores in scored])
    table = [row for request, scores in scored for row in _rows(request, scores, decode)]
    return Evaluation(
        {
            **{f"evaluation/{name}": value for name, value in values.items()},
            "evaluation/failed": float(len(problems) - len(scored)),
        },
        table,
    )


def _evaluated(request: ScoreRequest, scores: Sequence[Score]) -> list[EvaluatedResponse]:
    return [
        EvaluatedResponse(
            score.answer, score.accuracy, len(response.token_ids), response.finish_reason == "length"
        )
        for response, score in zip(request.responses, scores, strict=True)
    ]


def _rows(request: ScoreRequest, scores: Sequence[Score], decode: Decode) -> list[dict[str, Any]]:
    """The rows of `Evaluation.table` for the responses to one problem."""
    return [
        {
            "problem_id": request.problem.problem_id,
            "prompt": request.problem.prompt_text,
            "ground_truth": request.problem.ground_truth,
            "answer": score.answer,
            "accuracy": score.accuracy,
            "length": len(response.token_ids),
            "finish_reason": response.finish_reason,
            "response": decode(response.token_ids),
        }
        for response, score in zip(request.responses, scores, strict=True)
    ]
