"""A run of a tiny model with random weights, as a case, and as files for the command."""

from pathlib import Path

from megatron_fipo.config import load_config
from megatron_fipo.families.registry import read_model_config
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.machine_file import save_machine
from tests.plan.machines import MACHINE
from tests.tiny_qwen2 import save_qwen2, save_tokenizer

RECIPE = Path(__file__).parents[2] / "examples/countdown/fipo.yaml"


def overrides(folder: Path) -> list[str]:
    """Of the countdown recipe: the model in `folder`, few and short responses."""
    return [
        f"model.path={folder / 'model'}",
        f"run_dir={folder / 'runs/tiny'}",
        "batch.responses_per_prompt=4",
        "rollout.prompts_in_flight=24",
        "rollout.max_response_length=48",
    ]


def save_tiny(folder: Path) -> Path:
    """The model, and `base.yaml`, the machine that stands in. Returns its path."""
    save_qwen2(folder / "model", 1, hidden_size=32, intermediate_size=64, max_position_embeddings=128)
    save_tokenizer(folder / "model")
    save_machine(MACHINE, folder / "base.yaml")
    return folder / "base.yaml"


def tiny_case(folder: Path, *more: str) -> Case:
    """After `save_tiny`."""
    config = load_config(RECIPE, [*overrides(folder), *more])
    return Case(config, *read_model_config(config.model.path), MACHINE)
