"""Training runs of a few steps under the real TRL, with `docs/use-in-trl.md`'s trainer and with TRL's own.

As a program, on two processes: python -m torch.distributed.run --nproc-per-node 2 -m tests.adapters.trl_runs FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.pages import ROOT, run_blocks

MODEL = str(ROOT / "examples" / "countdown" / "base-model")
FIPOTrainer: type[GRPOTrainer] = run_blocks("use-in-trl.md", 0, 1)["FIPOTrainer"]


UnweightedTrainer: type[GRPOTrainer] = type(
    "UnweightedTrainer", (FIPOTrainer,), {"fipo": {"influence_clip": (1.0, 1.0), "drop_dual_clipped": False}}
)
"""The page's trainer with all weights 1 and no drop rule, which is DAPO."""


def make_trainer(trainer: type[GRPOTrainer], folder: Path, **settings: Any) -> GRPOTrainer:
    """Plain SGD, since Adam would hide a wrong scale of the gradient. About half of the completions are truncated."""
    defaults = {
        "output_dir": str(folder),
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 10.0,
        "beta": 0.0,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 28,
        "max_steps": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    prompts = Dataset.from_dict({"prompt": ["9,2,7=14:", "13,90,4=31:", "1,2,3=9:", "4,5,6=26:"] * 16})
    torch.manual_seed(0)
    return trainer(
        model=MODEL,
        reward_funcs=lambda completions, **columns: [float(len(text) % 7) for text in completions],
        args=GRPOConfig(**(defaults | settings)),
        train_dataset=prompts,
    )


def train(trainer: type[GRPOTrainer], folder: Path, **settings: Any) -> tuple[list[torch.Tensor], list[dict]]:
    """Final weights, and the log of each step."""
    run = make_trainer(trainer, folder, **settings)
    run.train()
    weights = [weight.detach().clone() for weight in run.accelerator.unwrap_model(run.model).parameters()]
    return weights, [entry for entry in run.state.log_history if "grad_norm" in entry]


def main() -> None:
    """Each rank writes its final weights under the three trainers."""
    folder = Path(sys.argv[1])
    runs = {
        trainer.__name__: train(trainer, folder, **TWO_PROCESSES)[0]
        for trainer in (FIPOTrainer, UnweightedTrainer, GRPOTrainer)
    }
    torch.save(runs, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


TWO_PROCESSES = {
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "mask_truncated_completions": True,
}

if __name__ == "__main__":
    main()
