"""A run of TRL's `GRPOTrainer` on countdown with the settings of a configuration of this project, for `trl_countdown.py`.

    python -m tools.bench.trl_run examples/countdown/dapo.yaml seed=1 run_dir=FOLDER

Needs an environment with TRL (`make venv-adapters`). Writes `metrics.jsonl` to run_dir: times, counts and evaluations have
the names and the meaning that they have in docs/metrics.md. Phases are seen from outside of TRL, by the calls that it makes:

- rollout: the model's `generate_batch` (or `generate`), and the reward function
- old log-probs: from the end of `generate_batch` to the call of the reward function, with TRL's padding and decoding
- update: from `compute_loss` to the end of the optimizer step
- other: the rest, such as TRL's tokenization, shuffling and logging
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from megatron_fipo.config import Config, load_config
from megatron_fipo.driver.evaluation_metrics import EvaluatedResponse, evaluation_values
from megatron_fipo.objective.advantages import is_informative, overlong_penalty
from megatron_fipo.phases import PhaseClock
from megatron_fipo.run_dir.evaluation_names import evaluation_metric
from megatron_fipo.run_dir.metrics_log import MetricsLog
from megatron_fipo.tasks.countdown.scorer import score_countdown
from megatron_fipo.tasks.registry import load_datasets
from megatron_fipo.tasks.task import Completion, Problem, Score
from tools.bench.harness import parser

Ids = Sequence[int]
BLOCK_TOKENS, SEQUENCES_AT_ONCE = 32, 64
"""The fastest of 16 to 176 tokens per block of the cache and 32 to 384 sequences, for this model on one core."""


def settings(config: Config, plain_generate: bool) -> GRPOConfig:
    """Those of TRL with the same meaning, and from `use_cpu` on what is fastest on a CPU."""
    batch, objective, optimizer, rollout = config.batch, config.objective, config.optimizer, config.rollout
    steps = optimizer_steps(config)
    return GRPOConfig(
        output_dir=config.run_dir,
        seed=config.seed,
        max_steps=config.iterations * steps,
        steps_per_generation=steps,
        per_device_train_batch_size=batch.mini_batch_prompts * batch.responses_per_prompt,
        gradient_accumulation_steps=1,
        num_generations=batch.responses_per_prompt,
        shuffle_dataset=False,
        max_completion_length=rollout.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        loss_type="dapo",
        beta=0.0,
        epsilon=objective.clip_low,
        epsilon_high=objective.clip_high,
        delta=objective.dual_clip,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.clip_grad,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_transformers_continuous_batching=not plain_generate,
        transformers_continuous_batching_config=batching(config),
        dataloader_pin_memory=False,
        logging_steps=steps,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )


def batching(config: Config) -> dict[str, int]:
    """Of transformers' continuous batching; the defaults are for GPUs. On a CPU attention between all sequences of a batch costs most."""
    return {
        "block_size": BLOCK_TOKENS,
        "num_blocks": SEQUENCES_AT_ONCE * math.ceil(config.rollout.longest_sequence / BLOCK_TOKENS),
        "max_batch_tokens": SEQUENCES_AT_ONCE,
    }


def optimizer_steps(config: Config) -> int:
    """Per iteration."""
    return config.batch.prompts_per_iteration // config.batch.mini_batch_prompts


class Responses:
    """From token ids to scores, by the scorer of this project."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._reward, self._limit = config.reward, config.rollout.max_response_length
        self._tokenizer = tokenizer

    def score(self, problem: Problem, ids: Ids) -> Score:
        """Of a response; `ids` end with the end-of-sequence token unless it was cut at the limit."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        reason = "length" if self.is_cut(ids) else "stop"
        return score_countdown(Completion(problem, text, np.array(ids, np.int32), reason))

    def is_cut(self, ids: Ids) -> bool:
        return ids[-1] != self._tokenizer.eos_token_id

    def penalty(self, ids: Ids) -> float:
        """Of a response near the limit, at most 0."""
        buffer, factor = self._reward.overlong_buffer, self._reward.overlong_factor
        return float(overlong_penalty(len(ids), self._limit, buffer, factor))


class Recorder(TrainerCallback):
    """The phases, counts and evaluations of a run, and their log."""

    def __init__(self, config: Config, evaluate: Callable[[], dict[str, float]]) -> None:
        """`evaluate` returns the metrics of the present weights."""
        self._config, self._evaluate = config, evaluate
        self._steps = optimizer_steps(config)
        self._log = MetricsLog(Path(config.run_dir))
        self._clock = PhaseClock()
        self._phase = ExitStack()
        self.counts: dict[str, float] = {}
        """Metrics of the iteration, beside its times."""

    def begin(self, phase: str) -> None:
        """The phase before ends, and this one begins."""
        self._phase.close()
        self._phase.enter_context(self._clock.phase(phase))

    def end(self) -> None:
        self._phase.close()

    def add(self, name: str, value: float) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + value

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run_evaluation(0)
        self._clock.take()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()
        iteration, rest = divmod(state.global_step, self._steps)
        if rest:
            return
        times = {f"time/{name}": seconds for name, seconds in self._clock.take().items()}
        self._log.log("iteration", iteration, {**self.counts, **times})
        self.counts.clear()
        every = self._config.evaluation.every
        if iteration == self._config.iterations or (every and iteration % every == 0):
            self._run_evaluation(iteration)

    def _run_evaluation(self, iteration: int) -> None:
        start = time.perf_counter()
        with self._clock.phase("evaluation"):
            values = self._evaluate()
        values["seconds"] = time.perf_counter() - start
        self._log.log(
            "evaluation", iteration, {evaluation_metric(name): value for name, value in values.items()}
        )


class RecordedTrainer(GRPOTrainer):
    """`GRPOTrainer`, whose updates are recorded."""

    recorder: Recorder

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        self.recorder.begin("update")
        self.recorder.add("tokens/used", int(inputs["completion_mask"].sum()))
        return super().compute_loss(model, inputs, *arguments, **named)


def reward_of(
    problems: Sequence[Problem], responses: Responses, recorder: Recorder, group: int
) -> Callable[..., list[float]]:
    """TRL's reward function. The responses to a problem follow one another, `group` of them."""
    by_id = {problem.problem_id: problem for problem in problems}

    def countdown(completion_ids: list[list[int]], problem_id: list[str], **_: Any) -> list[float]:
        recorder.begin("rollout")
        scores = [
            responses.score(by_id[name], ids) for name, ids in zip(problem_id, completion_ids, strict=True)
        ]
        rewards = [
            score.reward + responses.penalty(ids) for score, ids in zip(scores, completion_ids, strict=True)
        ]
        accuracies = np.reshape([score.accuracy for score in scores], (-1, group))
        same = [row for row in accuracies if not is_informative(row)]
        right = float(sum(row[0] for row in same))
        recorder.counts |= {
            "reward/mean": float(np.mean(rewards)),
            "accuracy/mean": float(accuracies.mean()),
            "rollout/prompts": float(len(accuracies)),
            "groups/all_right": right,
            "groups/all_wrong": len(same) - right,
        }
        recorder.end()
        return rewards

    return countdown


class Evaluation:
    """avg@k on held-out problems."""

    def __init__(self, config: Config, model: Any, tokenizer: Any, held_out: Sequence[Problem]) -> None:
        sampling = config.evaluation
        self._model, self._generate_batch = model, model.generate_batch  # as it is before `record`
        self._held_out, self._count = held_out, sampling.samples_per_problem
        self._responses = Responses(config, tokenizer)
        self._batching = ContinuousBatchingConfig(**batching(config))
        self._sampling = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=config.rollout.max_response_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def values(self) -> dict[str, float]:
        """Metrics of the present weights, by the last part of their names."""
        asked = [problem for problem in self._held_out for _ in range(self._count)]
        training = self._model.training
        with torch.no_grad():
            outputs = self._generate_batch(
                [list(problem.prompt_ids) for problem in asked],
                generation_config=self._sampling,
                continuous_batching_config=self._batching,
                progress_bar=False,
            )
        self._model.train(
            training
        )  # `generate_batch` ends it, and TRL drops the metrics of a model in evaluation
        responses = [output.generated_tokens for output in outputs.values()]
        evaluated = [self._evaluated(*each) for each in zip(asked, responses, strict=True)]
        starts = range(0, len(evaluated), self._count)
        return evaluation_values([evaluated[start : start + self._count] for start in starts])

    def _evaluated(self, problem: Problem, ids: Ids) -> EvaluatedResponse:
        score = self._responses.score(problem, ids)
        return EvaluatedResponse(score.answer, score.accuracy, len(ids), self._responses.is_cut(ids))


def record(model: Any, name: str, recorder: Recorder) -> None:
    """Let `recorder` see the calls of `model.generate` or `model.generate_batch`."""
    method = getattr(model, name)

    def recorded(*arguments: Any, **named: Any) -> Any:
        recorder.begin("rollout")
        generated = method(*arguments, **named)
        recorder.begin("old_log_probs")
        return generated

    setattr(model, name, recorded)


def train(config: Config, plain_generate: bool = False) -> GRPOTrainer:
    """The trainer, after training from the configuration's model and logging into its run_dir."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    dataset, held_out = load_datasets(config, tokenizer, datetime.now())
    problems = dataset.take(config.batch.prompts_per_iteration * config.iterations)
    evaluated = [problem for problems in held_out.values() for problem in problems]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    recorder = Recorder(config, Evaluation(config, model, tokenizer, evaluated).values)
    record(model, "generate" if plain_generate else "generate_batch", recorder)
    responses, group = Responses(config, tokenizer), config.batch.responses_per_prompt
    rows = {
        "prompt": [problem.prompt_text for problem in problems],
        "problem_id": [problem.problem_id for problem in problems],
    }
    trainer = RecordedTrainer(
        model=model,
        reward_funcs=reward_of(problems, responses, recorder, group),
        args=settings(config, plain_generate),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    trainer.train()
    return trainer


def main() -> None:
    options = parser(__doc__)
    options.add_argument("config", metavar="CONFIG.yaml")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options.add_argument("--plain-generate", action="store_true", help="TRL's default generation")
    arguments = options.parse_args()
    train(load_config(arguments.config, arguments.overrides), arguments.plain_generate)


if __name__ == "__main__":
    main()
