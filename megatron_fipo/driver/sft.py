"""`megatron-fipo sft`: supervised training of a model folder or of random weights, on rows or on generated traces.

Ranks, packing, head and optimizer are those of reinforcement learning; the loss is plain cross-entropy on the response.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from megatron_fipo.batching.packing import micro_batch_multiple, plan_micro_batches
from megatron_fipo.batching.trajectory import Trajectory
from megatron_fipo.checkpoint.hf_config import load_hf_config
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.tokenizer import load_tokenizer
from megatron_fipo.config import (
    HeadConfig,
    ModelConfig,
    OptimizerSettings,
    RecoveryConfig,
    RouterConfig,
    SftConfig,
    validate_sft,
)
from megatron_fipo.config.card_rules import CardNeeds, card_findings, check_cards
from megatron_fipo.config.sft_rules import rate_note
from megatron_fipo.driver.cluster import ray_cluster
from megatron_fipo.driver.sft_data import SupervisedData, supervised_data
from megatron_fipo.driver.tokenizer import pad_id
from megatron_fipo.driver.trainer_group import SftTrainer
from megatron_fipo.environment import this_machine
from megatron_fipo.errors import UserError
from megatron_fipo.families.registry import read_architecture
from megatron_fipo.outputs import check_new_folder
from megatron_fipo.trainer.protocol import RankSettings

STEPS_PER_CALL = 20
"""Most optimizer steps per message to the ranks."""
SECONDS_PER_CALL = 5.0
"""A message has fewer steps if they would take longer: the loss is shown after each message."""


def train(config: SftConfig) -> None:
    """`megatron-fipo sft`: imitate responses and write the model to `output_dir` in Hugging Face format."""
    machine = this_machine()
    source = Path(config.start)
    architecture = read_architecture(source)
    validate_sft(config, architecture, machine)
    notes = (
        check_cards(card_findings(machine.accelerators, CardNeeds(config.dtype)))
        if machine.accelerators
        else []
    )
    target = Path(config.output_dir)
    check_new_folder(target, "output_dir")
    if config.model_path is not None:
        open_model_folder(source)
    load_hf_config(source, trust_remote_code=False)
    tokenizer, end_ids = load_tokenizer(source, trust_remote_code=False, vocab_size=architecture.vocab_size)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {source} has no end-of-sequence token; set eos_token in its tokenizer_config.json."
        )
    data = supervised_data(config, tokenizer, end_ids, print)
    with (
        Progress() as progress,
        ray_cluster(None, workers=config.parallel.world_size, log=progress.console.print),
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        for note in (*notes, rate_note(config)):
            if note is not None:
                progress.console.print(note)
        initial = source
        if config.model_path is None:
            initial = Path(folder) / "initial"
            _write_initial_model(config, initial)
        trainer = SftTrainer(_rank_settings(config, initial), int(machine.gpus > 0))
        stack.callback(trainer.shutdown)
        trainer.start()
        for line in trainer.describe():
            progress.console.print(line)
        _train(config, trainer, data, pad_id(tokenizer), progress)
        target.parent.mkdir(parents=True, exist_ok=True)
        trainer.export_hf(initial, target)
    print(f"model {target}")


def _train(
    config: SftConfig, trainer: SftTrainer, data: SupervisedData, pad_token_id: int, progress: Progress
) -> None:
    """All steps, with the loss of the held-out rows before and after them."""
    rates = [learning_rate(config, step) for step in range(config.steps)]
    measure = _held_out_measurement(config, trainer, data.held_out, pad_token_id, progress.console.print)
    measure("before training")
    bar = progress.add_task("supervised training", total=config.steps)
    done, count = 0, 1
    while done < config.steps:
        count = min(count, config.steps - done)
        started = time.monotonic()
        batches = [_plan(_take(data.training, config.tokens_per_step), config) for _ in range(count)]
        losses = trainer.train_steps(batches, rates[done : done + count], pad_token_id)
        done += count
        loss = f"loss {sum(losses) / count:.4f}"
        progress.update(bar, advance=count, description=f"supervised training, {loss}")
        if not progress.console.is_terminal:
            progress.console.print(f"{done:,} of {config.steps:,} steps, {loss}")
        per_step = (time.monotonic() - started) / count
        count = max(1, min(STEPS_PER_CALL, int(SECONDS_PER_CALL / per_step)))
    measure(f"after {config.steps} steps")


def _held_out_measurement(
    config: SftConfig,
    trainer: SftTrainer,
    held_out: Sequence[Trajectory],
    pad_token_id: int,
    log: Callable[[str], Any],
) -> Callable[[str], None]:
    """A function that logs the loss of the held-out rows, and when it was measured; it does nothing if there are none."""
    plan = _plan(held_out, config) if held_out else None

    def measure(when: str) -> None:
        if plan is not None:
            loss = trainer.supervised_loss(plan, pad_token_id)
            log(f"held-out loss {when}: {loss:.4f} per response token, {len(held_out):,} rows")

    return measure


def _write_initial_model(config: SftConfig, target: Path) -> None:
    """Random weights for the model config, as a Hugging Face folder."""
    import torch

    from megatron_fipo.checkpoint.random_weights import write_random_model

    write_random_model(Path(config.start), target, config.seed, getattr(torch, config.dtype))


def learning_rate(config: SftConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    settings = config.optimizer
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(config.steps - settings.warmup_steps, 1)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _take(traces: Iterator[Trajectory], tokens: int) -> list[Trajectory]:
    """Complete traces with at least `tokens` tokens in total."""
    taken: list[Trajectory] = []
    while sum(trace.length for trace in taken) < tokens:
        taken.append(next(traces))
    return taken


def _plan(traces: Sequence[Trajectory], config: SftConfig) -> list[list[list[Trajectory]]]:
    parallel = config.parallel
    plan = plan_micro_batches(
        [trace.length for trace in traces],
        data_parallel_size=parallel.data_parallel_size,
        token_budget=config.micro_batch_tokens,
        length_multiple=parallel.length_multiple,
        count_multiple=micro_batch_multiple(
            parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        ),
    )
    return [[[traces[i] for i in micro] for micro in rank] for rank in plan]


def _rank_settings(config: SftConfig, folder: Path) -> RankSettings:
    optimizer = OptimizerSettings(
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta2=config.optimizer.adam_beta2,
        clip_grad=config.optimizer.clip_grad,
    )
    router = RouterConfig(replay="none", trainable=True)
    model = ModelConfig(path=str(folder), dtype=config.dtype, layer_spec=config.layer_spec, router=router)
    return RankSettings(
        model,
        config.parallel,
        HeadConfig(),
        optimizer,
        temperature=1.0,
        seed=config.seed,
        deterministic=False,
        outside_wait_s=0.0,
        stall_timeout_s=RecoveryConfig().stall_timeout_s,
    )
