"""Held-out accuracy with the same engines that sample for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config import EvaluationConfig
from megatron_fipo.data.problem import Problem
from megatron_fipo.errors import UserError
from megatron_fipo.reward.score import Scorer
from megatron_fipo.rollout.collector import Pool, request_seed
from megatron_fipo.rollout.protocol import RAY_LOGS, GenerationRequest, SamplingParams
from megatron_fipo.trainer.evaluation_metrics import EvaluatedResponse, evaluation_values


@dataclass(frozen=True)
class Evaluation:
    values: dict[str, float]
    """`evaluation/...` metrics."""
    table: list[dict[str, Any]]
    """One row per response: problem, answer, ground truth, accuracy, length, text."""


def evaluate(
    pool: Pool,
    problems: Sequence[Problem],
    scorer: Scorer,
    decode: Callable[[Sequence[int]], str],
    settings: EvaluationConfig,
    *,
    max_new_tokens: int,
    seed: int,
    version: int,
    on_finished: Callable[[int], None] | None = None,
) -> Evaluation:
    """Sample every problem `samples_per_problem` times and score. The seed is the same at each evaluation of a run.

    A problem whose request failed for good is left out and counted (`evaluation/failed`), never scored as wrong.
    """
    requests = [
        GenerationRequest(
            problem.problem_id, problem.prompt_ids, settings.samples_per_problem, request_seed(seed, f"evaluation-{place}")
        )
        for place, problem in enumerate(problems)
    ]
    sampling = SamplingParams(settings.temperature, settings.top_p, max_new_tokens)
    result = pool.generate(requests, sampling, version, on_finished)
    responses: list[list[EvaluatedResponse]] = []
    table = []
    for problem, generations in zip(problems, result.generations, strict=True):
        if generations is None:
            continue
        answered = []
        for generation in generations:
            text = decode(generation.response_ids)
            score = scorer(text, problem, generation.finish_reason)
            truncated = generation.finish_reason == "length"
            answered.append(EvaluatedResponse(score.answer, score.accuracy, len(generation.response_ids), truncated))
            table.append(
                {
                    "problem_id": problem.problem_id,
                    "prompt": problem.prompt_text,
                    "ground_truth": problem.ground_truth,
                    "answer": score.answer,
                    "accuracy": score.accuracy,
                    "length": len(generation.response_ids),
                    "finish_reason": generation.finish_reason,
                    "response": text,
                }
            )
        responses.append(answered)
    if not responses:
        raise UserError(f"all {len(problems)} evaluation requests failed; see {RAY_LOGS}")
    values = {f"evaluation/{name}": value for name, value in evaluation_values(responses).items()}
    return Evaluation({**values, "evaluation/failed": float(len(problems) - len(responses))}, table)
