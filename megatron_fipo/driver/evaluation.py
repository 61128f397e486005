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
from megatron_fipo.tasks.task import Decode, Problem, Scorer

Generate = Callable[[Sequence[GenerationRequest], SamplingParams], Sequence[Generation | None]]
"""Answers requests in their order; None for a request that failed permanently."""


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
    problems: Sequence[Problem],
    scorer: Scorer,
    decode: Decode,
    settings: EvaluationConfig,
    *,
    max_new_tokens: int,
    seed: int,
) -> Evaluation:
    """Sample every problem `samples_per_problem` times and score. The seeds are the same at each evaluation of a run.

    A problem with a request that failed permanently is excluded and counted (`evaluation/failed`), never scored as wrong.
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
    responses: list[list[EvaluatedResponse]] = []
    table = []
    for index, problem in enumerate(problems):
        generations = answers[index * k : (index + 1) * k]
        if any(generation is None for generation in generations):
            continue
        answered = []
        for generation in filter(None, generations):
            text = decode(generation.response_ids)
            score = scorer(text, problem, generation.finish_reason)
            truncated = generation.finish_reason == "length"
            answered.append(
                EvaluatedResponse(score.answer, score.accuracy, len(generation.response_ids), truncated)
            )
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
        raise UserError(
            f"every one of the {len(problems)} evaluation problems had a request that failed; see {ray_logs()}"
        )
    values = {f"evaluation/{name}": value for name, value in evaluation_values(responses).items()}
    return Evaluation({**values, "evaluation/failed": float(len(problems) - len(responses))}, table)
