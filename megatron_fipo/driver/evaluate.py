"""`megatron-fipo evaluate`: engines on a Hugging Face folder, held-out problems, no trainer."""

import contextlib
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.driver.cluster import run_cluster, start_engines
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.evaluation import evaluate as evaluate_problems
from megatron_fipo.driver.loop import write_table
from megatron_fipo.driver.tokenizer import decoder, load_tokenizer
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.tasks.registry import load_evaluation, scorer


def evaluate(model_dir: str, config: Config, output: Path) -> None:
    """Print the held-out accuracy of a Hugging Face folder and write every response to `output`."""
    tokenizer = load_tokenizer(model_dir, config.model.trust_remote_code)
    with Console(0) as console:
        held_out = load_evaluation(
            config.data, config.rollout.max_prompt_length, tokenizer, config.seed, console.note
        )
        console.phase("evaluation")
        with (
            run_cluster(config, read_architecture(Path(model_dir))) as machine,
            contextlib.ExitStack() as stack,
        ):
            pool = start_engines(config, model_dir, machine, console.note)
            stack.callback(pool.shutdown)
            evaluation = evaluate_problems(
                pool.generate,
                held_out,
                scorer(config.reward.name),
                decoder(tokenizer),
                config.evaluation,
                max_new_tokens=config.rollout.max_response_length,
                seed=config.seed,
            )
        console.evaluation(0, evaluation.values)
        write_table(output, evaluation.table)
        console.note(f"every response and its score: {output}")
