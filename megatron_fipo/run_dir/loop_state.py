"""The state of the training loop in a checkpoint, which the driver writes.

    loop.json             iteration, weight version, position in the data, waiting groups without their tokens
    tokens.npz            the tokens and log-probs of these groups; absent with `--replay`

The checkpoint's manifest has the checksums of both.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOOP_FILE = "loop.json"
TOKENS_FILE = "tokens.npz"


@dataclass
class RolloutState:
    """What sampling needs to resume. Empty with `--replay`."""

    values: dict[str, Any] = field(default_factory=dict)
    """Position in the training data, buffered groups and unfinished responses, as JSON values."""
    tokens: dict[str, list[np.ndarray]] = field(default_factory=dict, compare=False)
    """Columns by name: arrays of one dtype and one dimension, stored one after another. A column that was read is
    one array."""


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
        _write_columns(folder / TOKENS_FILE, state.rollout.tokens)
    (folder / LOOP_FILE).write_text(json.dumps(values) + "\n")


def read_loop_state(folder: Path) -> LoopState:
    """The inverse of `write_loop_state`, bit for bit. Raises ValueError, which names the file, for other files."""
    try:
        values = json.loads((folder / LOOP_FILE).read_bytes())
        state = LoopState(values["iteration"], values["weight_version"], RolloutState(values["rollout"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its {LOOP_FILE} is not a loop state of this version ({error!r})") from error
    numbers = state.iteration, state.weight_version
    if (
        any(type(number) is not int or number < 0 for number in numbers)
        or type(values["rollout"]) is not dict
    ):
        raise ValueError(
            f"its {LOOP_FILE} is not a loop state of this version (iteration {numbers[0]!r}, weight version "
            f"{numbers[1]!r}, rollout of type {type(values['rollout']).__name__})"
        )
    if (folder / TOKENS_FILE).exists():
        try:
            state.rollout.tokens = _read_columns(folder / TOKENS_FILE)
        except Exception as error:  # that of a damaged archive depends on the damage
            raise ValueError(f"its {TOKENS_FILE} has no readable columns ({error!r})") from error
    return state


def _write_columns(path: Path, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
    """As `numpy.savez`, but without a copy of the column: it may have half a gigabyte."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, parts in columns.items():
            header = {
                "descr": np.lib.format.dtype_to_descr(parts[0].dtype),
                "fortran_order": False,
                "shape": (sum(map(len, parts)),),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)


def _read_columns(path: Path) -> dict[str, list[np.ndarray]]:
    """Raises any error for another file. Takes no more memory than the file has bytes, and unpickles nothing."""
    columns = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            with archive.open(member) as file:
                column = np.lib.format.read_array(file, allow_pickle=False)
                if column.ndim != 1 or file.read(1):  # the end has the checksum
                    raise ValueError(f"{member.filename} is not one array of one dimension")
            columns[member.filename.removesuffix(".npy")] = [column]
    return columns
