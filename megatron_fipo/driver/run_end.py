"""The end of a run: the exported model, the report, and the summary on the console."""

import shutil
from pathlib import Path

from megatron_fipo.driver.console import Console
from megatron_fipo.driver.trainer_group import RLTrainer
from megatron_fipo.errors import UserError, writing
from megatron_fipo.report import write_report
from megatron_fipo.run_dir.losses import losses_sentence
from megatron_fipo.run_dir.metrics_log import read_metrics

MODEL = "model"
"""The folder of the trained model in a run's folder."""


def check_export(target: Path) -> None:
    """Raise UserError if `export_model` could not replace `target`, which may be a folder or absent."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(
            f"{target} is {'a link' if target.is_symlink() else 'a file'}, but the trained model is written there as a folder; "
            "move it away"
        )


def export_model(trainer: RLTrainer, source: Path, target: Path) -> None:
    """Write the weights beside an older export, then replace it."""
    fresh = target.with_name(target.name + "-new")
    with writing(target):
        for leftover in (fresh, *target.parent.glob(f".{fresh.name}.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        trainer.export_hf(source, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def write_report_of(run_dir: Path, console: Console) -> None:
    """Write the report of what has been logged. A failure is logged and hides no other error."""
    if not read_metrics(run_dir):
        return
    try:
        write_report(run_dir)
    except (OSError, UserError) as error:
        console.note(f"the report could not be written: {error}")


def summarize(run_dir: Path, console: Console) -> None:
    """Log the use of the sampled tokens and what was lost, and print the table of held-out accuracy."""
    records = read_metrics(run_dir)
    iterations = [record.values for record in records if record.kind == "iteration"]
    generated = sum(values["tokens/generated"] for values in iterations)
    if generated:
        used, filtered = (
            sum(values[f"tokens/{name}"] for values in iterations) / generated
            for name in ("used", "filtered")
        )
        console.note(
            f"{used:.1%} of the sampled tokens were trained on, {filtered:.1%} were in groups whose responses were all "
            f"correct or all wrong; {iterations[-1]['rollout/unused_share']:.1%} of the informative responses were unused"
        )
    if iterations and (losses := losses_sentence(iterations[-1])) is not None:
        console.note(losses)
    evaluations = {record.iteration: record.values for record in records if record.kind == "evaluation"}
    before, after = evaluations.get(0), evaluations.get(max(evaluations)) if evaluations else None
    console.summary(before, after, run_dir / "report.html", run_dir / MODEL)
