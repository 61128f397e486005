"""`megatron-fipo evaluate`: engines on a Hugging Face folder, held-out problems, no trainer."""

import contextlib
from datetime import datetime
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.config.card_rules import CardNeeds, card_findings, check_cards
from megatron_fipo.driver.cluster import (
    run_cluster,
    start_engines,
    start_environments,
    start_scorers,
    try_rewards,
)
from megatron_fipo.driver.console import Console
from megatron_fipo.driver.evaluation import evaluate as evaluate_problems
from megatron_fipo.driver.scoring.rehearsal import RESPONSE, trials
from megatron_fipo.driver.tokenizer import checked_tokenizer, prints_date
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.outputs import check_output_file, write_table
from megatron_fipo.tasks.registry import environments_of, load_evaluation, rewards_of
from megatron_fipo.tasks.response_text import ResponseText


def evaluate(model_dir: str, config: Config, output: Path) -> None:
    """Print the held-out accuracy of a Hugging Face folder and write every response to `output`, one JSON object per line.

    Raises UserError before anything starts if `output` cannot be written.
    """
    check_output_file(output, "--output")
    tokenizer = checked_tokenizer(model_dir, config.model.trust_remote_code)
    with Console(0) as console:
        now = datetime.now()
        if prints_date(tokenizer):
            console.note(f"the chat template prints the date, {now:%Y-%m-%d}, which changes from day to day")
        held_out = load_evaluation(config, tokenizer, now, console.note)
        console.phase("evaluation")
        with (
            run_cluster(config, read_architecture(Path(model_dir)), console.note) as machine,
            contextlib.ExitStack() as stack,
        ):
            if machine.accelerators is not None:
                needs = CardNeeds(config.model.dtype)
                for note in check_cards(card_findings(machine.accelerators, needs)):
                    console.note(note)
            own = trials(config, [], held_out, tokenizer.encode(RESPONSE, add_special_tokens=False))
            try_rewards(config, model_dir, own, console.note)
            pool = start_engines(config, model_dir, machine, console.note)
            stack.callback(pool.shutdown)
            scorers = start_scorers(config, model_dir, rewards_of(*held_out.values()), console.note)
            stack.callback(scorers.shutdown)
            generate = pool.generate
            if environments := environments_of(*held_out.values()):
                episodes = start_environments(config, model_dir, environments, pool, console.note)
                stack.callback(episodes.shutdown)
                generate = episodes.generate
            evaluation = evaluate_problems(
                generate,
                scorers.score,
                held_out,
                ResponseText(tokenizer),
                config.evaluation,
                max_new_tokens=config.rollout.max_response_length,
                stop=config.rollout.stop,
                seed=config.seed,
            )
        console.evaluation(0, evaluation.values)
        if evaluation.all_wrong is not None:
            console.note(evaluation.all_wrong)
        write_table(output, evaluation.table)
        console.note(f"every response and its score: {output}")
