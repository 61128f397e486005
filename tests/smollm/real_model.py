"""A real language model for slow tests: SmolLM2-135M-Instruct, as tools/fetch_smollm.py makes it, and prompts of its example."""

import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "SMOLLM_FOLDER"
FOLDER = Path(os.environ.get(VARIABLE, ROOT / "runs/smollm2-135m-instruct"))
needs_smollm = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(),
    reason=f"{FOLDER} is absent: make smollm, or set {VARIABLE} to a folder that tools/fetch_smollm.py made",
)


def rows(count: int) -> list[dict]:
    """The first held-out rows of examples/smollm-math."""
    example = str(ROOT / "examples/smollm-math")
    if example not in sys.path:
        sys.path.append(example)
    import make_data

    return [problem.row for problem in make_data.generate(seed=1)["held-out"][:count]]


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def prompts(count: int) -> list[tuple[int, ...]]:
    """Tokens of these rows' prompts, as training encodes them."""
    from megatron_fipo.tasks.prompt_encoder import PromptEncoder
    from megatron_fipo.tasks.row import parse_row

    encode = PromptEncoder(tokenizer(), 512, datetime(2026, 11, 28))
    return [encode("row", parse_row("row", row).prompt)[1] for row in rows(count)]
