"""The state of the training loop in a checkpoint, which the driver writes.

    loop.json             iteration, weight version, position in the data, waiting groups without their tokens
    tokens.safetensors    the tokens and log-probs of these groups; absent with `--replay`

The checkpoint's manifest has the checksums of both.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_fipo.errors import first_line

LOOP_FILE = "loop.json"
TOKENS_FILE = "tokens.safetensors"


@dataclass
class RolloutState:
    """What sampling needs to resume. Empty with `--replay`."""

    values: dict[str, Any] = field(default_factory=dict)
    """Position in the training data, buffered groups and unfinished responses, as JSON values."""
    tokens: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    """Arrays of any length, by name."""


@dataclass
class LoopState:
    """What the training loop needs to resume, apart from weights, optimizer and random states."""

    iteration: int = 0
    """Iterations completed."""
    weight_version: int = 0
    """Weight version that the engines serve; it increases by one per iteration."""
    rollout: RolloutState = field(default_factory=RolloutState)


def write_loop_state(folder: Path, state: LoopState) -> None:
    """Write `state` into an existing folder. Raises OSError."""
    values = {
        "iteration": state.iteration,
        "weight_version": state.weight_version,
        "rollout": state.rollout.values,
    }
    if state.rollout.tokens:
        try:
            save_file(state.rollout.tokens, folder / TOKENS_FILE)
        except SafetensorError as error:
            raise OSError(first_line(error)) from error
    (folder / LOOP_FILE).write_text(json.dumps(values) + "\n")


def read_loop_state(folder: Path) -> LoopState:
    """The inverse of `write_loop_state`, bit for bit. Raises ValueError for files that are not a loop state."""
    try:
        values = json.loads((folder / LOOP_FILE).read_bytes())
        tokens = load_file(folder / TOKENS_FILE) if (folder / TOKENS_FILE).exists() else {}
        rollout = RolloutState(values.pop("rollout"), tokens)
        return LoopState(**values, rollout=rollout)
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(repr(error)) from error
